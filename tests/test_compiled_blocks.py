"""What torch.compile makes of SD3.5-Medium's blocks on an H200, counted without one: no more than it may be."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compiled_blocks.__main__ import RESULTS, main
from benchmarks.compiled_blocks.gpus import GPUS
from benchmarks.compiled_blocks.report import counted_on, table
from dgpo_fast.config.command_line import run_command
from dgpo_fast.errors import UserError
from tests.processes import run_alone

ROOT = Path(__file__).parents[1]
WRITTEN = json.loads(RESULTS.read_text(encoding="utf-8"))
PROGRAMS = ("single.frozen", "single.merged")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Counts of one kind of block, by its weights and direction."""
    out = tmp_path_factory.mktemp("counted") / "counted.json"
    # A process of its own: torch remembers the GPU that it is made to find.
    run_alone(["-m", "benchmarks.compiled_blocks", "H200", "--only", *PROGRAMS, "--out", str(out)])
    rows = json.loads(out.read_text(encoding="utf-8"))["H200"]["programs"]
    return {(row["weights"], row["direction"]): row for row in rows}


def megabytes(row: dict[str, Any], *kinds: str) -> float:
    """A sample's."""
    return sum(row[f"{kind}_bytes"] for kind in kinds) / row["rows"] / 1e6


def test_a_forward_without_a_gradient_moves_little(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    forward = counted["frozen", "forward"]
    assert megabytes(forward, "fused") <= 60
    assert forward["fused"] <= 12 and forward["library"] <= 15


def test_the_policy_moves_little(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    forward, backward = counted["merged", "forward"], counted["merged", "backward"]
    assert megabytes(forward, "fused", "library") <= 195
    assert megabytes(backward, "fused", "library") <= 325
    assert forward["fused"] + forward["library"] <= 31
    assert backward["fused"] + backward["library"] <= 62


def test_the_written_counts_are_those_of_the_code(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    """By the same version of torch to the last byte; another one may fuse differently."""
    about = WRITTEN["H200"]
    for row in about["programs"]:
        found = counted.get((row["weights"], row["direction"])) if row["part"] == "single" else None
        if found is not None and about["torch"].split("+")[0] == torch.__version__.split("+")[0]:
            assert found == row
        elif found is not None:
            assert megabytes(found, "fused", "library") == pytest.approx(megabytes(row, "fused", "library"), rel=0.1)


def test_the_tables_are_those_of_the_file() -> None:
    """In docs/performance.md, what `python -m benchmarks.compiled_blocks H200 --table` prints."""
    shown = table(WRITTEN, "H200")
    assert shown in (ROOT / "docs/performance.md").read_text(encoding="utf-8"), shown
    assert shown.count("**all 24 blocks**") >= 5 and "decoder" in shown


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["H300"], f"GPU 'H300' is not known; known are {', '.join(GPUS)}"),
        (["H200", "--only", "triple.frozen"], "--only triple.frozen: name some of dual.plain, single.plain,"),
        (["L40S", "--table"], "L40S: not counted yet; run python -m benchmarks.compiled_blocks 'L40S'"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(
    args: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", *args])
    assert run_command(main) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}") and error.count("\n") == 1


def test_another_version_of_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an inner name is missing, the error is one line."""
    monkeypatch.delattr(torch._C, "_conv_determine_backend_memory_format")
    with pytest.raises(UserError, match=r"^torch \S+ is not one of 2.11 to 2.13, whose compiler is looked into here: "):
        counted_on("H200", GPUS["H200"], ["single.frozen"])
