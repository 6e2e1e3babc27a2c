"""What torch.compile makes of SD3.5-Medium's blocks on an H200, counted without one: no more than it may be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compiled_blocks.__main__ import RESULTS
from benchmarks.compiled_blocks.gpus import GPUS

ROOT = Path(__file__).parents[1]
WRITTEN = json.loads(RESULTS.read_text(encoding="utf-8"))
PROGRAMS = ("single.frozen", "single.lora")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: torch remembers the GPU that it is made to find."""
    whole = [sys.executable, "-m", "benchmarks.compiled_blocks", *args]
    return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Counts of one kind of block, by its weights and direction."""
    out = tmp_path_factory.mktemp("counted") / "counted.json"
    done = command("H200", "--only", *PROGRAMS, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["H200"]["programs"]
    return {(row["weights"], row["direction"]): row for row in rows}


def megabytes(row: dict[str, Any], *kinds: str) -> float:
    """A sample's."""
    return sum(row[f"{kind}_bytes"] for kind in kinds) / row["rows"] / 1e6


def test_a_forward_without_a_gradient_moves_little(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    forward = counted["frozen", "forward"]
    assert megabytes(forward, "fused") <= 88
    assert (forward["fused"], forward["library"]) <= (14, 15)


def test_the_policy_moves_little(counted: dict[tuple[str, str], dict[str, Any]]) -> None:
    forward, backward = counted["lora", "forward"], counted["lora", "backward"]
    assert megabytes(forward, "fused", "library") <= 256
    assert megabytes(backward, "fused", "library") <= 344
    assert forward["fused"] + forward["library"] <= 49
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
    from benchmarks.compiled_blocks.report import table

    shown = table(WRITTEN, "H200")
    assert shown in (ROOT / "docs/performance.md").read_text(encoding="utf-8"), shown
    assert shown.count("**all 24 blocks**") >= 5 and "decoder" in shown


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["H300"], f"GPU 'H300' is not known; known are {', '.join(GPUS)}"),
        (["H200", "--only", "triple.frozen"], "--only triple.frozen: name some of dual.frozen, single.frozen,"),
        (["L40S", "--table"], "L40S: not counted yet; run python -m benchmarks.compiled_blocks 'L40S'"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(args: list[str], line: str) -> None:
    done = command(*args)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1


def test_another_version_of_torch_is_named() -> None:
    """Where an inner name is missing, the error is one line."""
    gone = "import torch._C; del torch._C._conv_determine_backend_memory_format; "
    run = "from benchmarks.compiled_blocks.__main__ import main, run_command; import sys; "
    end = "sys.argv = ['', 'H200', '--only', 'single.frozen']; sys.exit(run_command(main))"
    done = subprocess.run([sys.executable, "-c", gone + run + end], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: torch {torch.__version__} is not one of 2.11 to 2.13")
