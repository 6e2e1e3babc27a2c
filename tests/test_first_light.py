"""`benchmarks/first_light.py` keeps what whole runs end with, seed by seed."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import ROOT


@pytest.fixture
def first_light(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.first_light")
    monkeypatch.setattr(module, "RESULTS", workspace / "results")
    return module


def call(first_light: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["first_light.py", "small.yaml", *arguments])
    first_light.main()


def test_a_seed_is_kept_though_the_next_one_fails(
    first_light: ModuleType, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has no seed that a run takes."""
    with pytest.raises(Exception, match="returned non-zero exit status 2"):
        call(first_light, monkeypatch, "--seeds", "0", "-5", "--iterations", "1")
    (folder,) = (workspace / "results").iterdir()
    report = json.loads((folder / "small.json").read_text())
    (run,) = report["runs"]
    assert report["settings"] == ["--iterations", "1"] and report["machine"]["torch"]
    assert run["seed"] == 0 and run["iterations"] == 1 and run["wall_s"] > run["training_s"]
    gain = run["after"]["reward_mean"] - run["before"]["reward_mean"]
    assert run["gain"]["reward_mean"] == pytest.approx(gain, abs=1e-6)
    assert {path.name for path in folder.iterdir()} == {
        "small.json",
        "small_before_after.png",
        "small_reward_curve.png",
    }


def test_what_was_tried_is_a_table(
    first_light: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(first_light, monkeypatch, "--search", "--seeds", "0", "--iterations", "1")
    capsys.readouterr()
    call(first_light, monkeypatch, "--table")
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split(" | ")[2:4] == ["seed", "iterations"]
    assert row.startswith("| `--iterations 1` |  | 0 | 1 |")
