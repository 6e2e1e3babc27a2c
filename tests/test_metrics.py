"""metrics.jsonl and the loggers that must never end a run."""

import sys
import time
import types
from pathlib import Path

import pytest
import torch

from dgpo_fast.config.options import Log
from dgpo_fast.run.metrics import Loggers, MetricsFile, Phases, read_metrics, write_json


def test_lines_after_a_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for iteration in (1, 2, 3):
        file.write({"iteration": iteration, "reward_mean": float("nan"), "heldout": [1.0, float("inf")]})
    path.write_text(path.read_text() + '{"iteration": 4, "rew')  # what a kill leaves
    resumed = MetricsFile(path, until=2)
    resumed.write({"iteration": 3})
    expected = {"reward_mean": None, "heldout": [1.0, None]}
    assert read_metrics(path) == [{"iteration": 1, **expected}, {"iteration": 2, **expected}, {"iteration": 3}]


def test_phases_add_up() -> None:
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        with phases("rollout"):
            time.sleep(0.02)
    taken = phases.take()
    assert list(taken) == ["rollout_s"] and taken["rollout_s"] >= 0.04
    assert phases.take() == {}


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"a": float("nan")})
    write_json(tmp_path / "summary.json", {"a": 2})
    with pytest.raises(TypeError):
        write_json(tmp_path / "summary.json", {"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert "2" in (tmp_path / "summary.json").read_text()


def test_a_missing_logger_is_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    notes: list[str] = []
    loggers = Loggers(Log(wandb="project"), tmp_path, {}, notes.append)
    loggers.write({"iteration": 1})
    assert len(notes) == 1 and notes[0].startswith("W&B is off: ModuleNotFoundError: ")


def test_a_logger_that_fails_later_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []

    def log(metrics: dict, step: int) -> None:
        if step == 2:
            raise ConnectionError("no\nnetwork")
        received.append(step)

    run = types.SimpleNamespace(id="1", log=log, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    notes: list[str] = []
    loggers = Loggers(Log(wandb="project"), tmp_path, {}, notes.append)
    for iteration in (1, 2, 3):
        loggers.write({"iteration": iteration})
    assert (received, notes) == ([1], ["W&B is off: ConnectionError: no network"])
