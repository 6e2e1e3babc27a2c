"""What separates an iteration from its floor, by counts and assumed rates: `python -m benchmarks.floor`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import floor
from benchmarks.floor import RATES, RESULT, Flops, Part, estimated, main, rows_trained, text
from benchmarks.pages import PERFORMANCE, part
from dgpo_fast.config.command_line import run_command
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.models.work import BACKWARD, ROLLOUT

WRITTEN = json.loads(RESULT.read_text(encoding="utf-8"))


def test_a_part_by_hand() -> None:
    """Two rows of 660 GFLOP in products, 390 in attention and 3.6 GB: 2 ms each; the floor has 790 TFLOP/s."""
    one = Part(ROLLOUT, 2, Flops(0.66, 0.39), 3600.0)
    assert one.floor_ms == pytest.approx(2 * 1050 / RATES.matmul)
    assert one.estimate_ms == pytest.approx(2 + 2 + 2)
    assert one.gaps_ms["fused kernels"] == pytest.approx(2)
    backward = Part(BACKWARD, 1, Flops(0, 0.35), 0)
    assert backward.estimate_ms == pytest.approx(1)


def test_rows_of_the_first_level() -> None:
    """4 of the 5 noisiest levels, the first of them with one row for 16 samples."""
    recipe = get_recipe("sd35m-geneval")
    assert rows_trained(recipe, shared=False) == 4
    assert rows_trained(recipe, shared=True) == pytest.approx(3.2 + 0.8 / 16)


def test_the_file_is_what_the_counts_give() -> None:
    found, changing = estimated(), ("commit", "date")
    written = {name: value for name, value in WRITTEN.items() if name not in changing}
    expected = json.loads(json.dumps({name: value for name, value in found.items() if name not in changing}))
    assert written == close_to(expected)


def close_to(value: Any) -> Any:
    """Numbers to nine digits, whatever they are in."""
    if isinstance(value, dict):
        return {name: close_to(one) for name, one in value.items()}
    if isinstance(value, list):
        return [close_to(one) for one in value]
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


def test_it_adds_up() -> None:
    """From the floor of a row a sample, down by the exact savings, up by what separates; the largest first."""
    assert WRITTEN["floor_ms"]["floor"] == pytest.approx(107.3, abs=0.3)
    assert sum(WRITTEN["floor_ms"].values()) == pytest.approx(WRITTEN["lower_floor_ms"])
    gaps = list(WRITTEN["exact_ms"].values())
    assert WRITTEN["lower_floor_ms"] + sum(gaps) == pytest.approx(WRITTEN["estimate_ms"])
    for kind in ("exact_ms", "inexact_ms"):
        milliseconds = list(WRITTEN[kind].values())
        assert milliseconds == sorted(milliseconds, reverse=True) and min(milliseconds) > 0


def test_the_page_shows_the_file() -> None:
    """Every figure of it as an estimate."""
    assert part("floor", PERFORMANCE) == text(WRITTEN)
    assert text(WRITTEN).startswith("**Estimated, not measured.**") and WRITTEN["estimated, not measured"] is True


@pytest.mark.parametrize(
    ("args", "name", "line"),
    [
        ([], "COUNTS", "nothing.json has no counts of the H200: run python -m benchmarks.compiled_blocks H200"),
        (["--table"], "RESULT", "nothing is estimated yet: run python -m benchmarks.floor"),
    ],
)
def test_what_is_missing_is_named(
    args: list[str],
    name: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["", *args])
    monkeypatch.setattr(floor, name, tmp_path / "nothing.json")
    assert run_command(main) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
