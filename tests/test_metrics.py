"""metrics.jsonl and the loggers that must never end a run."""

import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_loggers_get_the_run_s_pictures_as_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, and again when it was written anew; one that fails leaves the numbers."""
    shown: list[tuple[str, tuple[int, ...], int]] = []
    scalars: list[int] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append(step)

        def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str) -> None:
            assert dataformats == "HWC"
            shown.append((name, image.shape, step))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    logged: list[tuple[int, list[str]]] = []
    run = types.SimpleNamespace(id="1", log=lambda what, step: logged.append((step, list(what))), finish=lambda: None)
    module = types.SimpleNamespace(init=lambda **_: run, Image=lambda path: Path(path).read_bytes())
    monkeypatch.setitem(sys.modules, "wandb", module)
    notes: list[str] = []
    loggers = Loggers(Log(tensorboard=True, wandb="project"), tmp_path, {}, notes.append)
    loggers.write({"iteration": 1})
    Image.new("RGB", (3, 2)).save(tmp_path / "progress.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "other.png")
    loggers.write({"iteration": 2})
    loggers.write({"iteration": 3})
    os.utime(tmp_path / "progress.png", (1, 1))
    (tmp_path / "before_after.png").write_bytes(b"no picture")
    loggers.write_pictures(3)
    loggers.write({"iteration": 4})
    assert shown[0] == ("progress", (2, 3, 3), 2) and {one[2] for one in shown} <= {2, 3} and scalars == [1, 2, 3, 4]
    steps = [(1, ["iteration"]), (2, ["iteration"]), (2, ["progress"]), (3, ["iteration"])]
    assert logged == [*steps, (3, ["progress", "before_after"]), (4, ["iteration"])]
    assert len(notes) == 1 and notes[0].startswith("TensorBoard gets no more pictures: UnidentifiedImageError: ")
