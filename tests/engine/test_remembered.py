"""Measurements are made once on a machine, whoever asks first."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from dgpo_fast.engine import attention
from dgpo_fast.engine.attention import Shape
from dgpo_fast.engine.remembered import FOLDER, remembered


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGPO_FAST_CACHE", str(tmp_path))
    return tmp_path / FOLDER


def test_measured_once() -> None:
    values = iter([{"torch": 1.0}, {"torch": 2.0}, {"torch": 3.0}])
    assert [remembered({"width": width}, lambda: next(values)) for width in (1, 1, 2)] == [
        {"torch": 1.0},
        {"torch": 1.0},
        {"torch": 2.0},
    ]


def test_all_who_measure_at_once_get_the_same() -> None:
    barrier = Barrier(8)

    def measure(value: int) -> int:
        barrier.wait()
        return value

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda value: remembered({"x": 1}, lambda: measure(value)), range(8)))
    assert len(set(found)) == 1


@pytest.mark.parametrize("damage", ["", "{", '{"key": 1}', "[]"])
def test_a_damaged_file_is_measured_again(damage: str, folder: Path) -> None:
    remembered({"x": 1}, lambda: 1)
    (path,) = folder.glob("*.json")
    path.write_text(damage)
    assert remembered({"x": 1}, lambda: 2) == 2
    assert json.loads(path.read_text())["value"] == 2
    assert list(folder.iterdir()) == [path]


def test_without_a_folder_it_is_measured_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DGPO_FAST_CACHE", str(tmp_path / "file"))
    assert [remembered({}, lambda value=value: value) for value in (1, 2)] == [1, 2]


def test_attention_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same milliseconds, to the last digit; another machine's threads are another measurement."""
    shapes = (Shape(2, 8, 2, 4, calls=1),)
    first = attention.timings(shapes, torch.device("cpu"), torch.float32)
    attention.time_attention.cache_clear()
    assert attention.timings(shapes, torch.device("cpu"), torch.float32) == first
    attention.time_attention.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert attention.timings(shapes, torch.device("cpu"), torch.float32) != first
