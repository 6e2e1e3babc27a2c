"""Measurements are made once on a machine, whoever asks first."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from dgpo_fast.engine import attention
from dgpo_fast.engine import remembered as remembered_module
from dgpo_fast.engine.remembered import FOLDER, remembered
from dgpo_fast.engine.timing import Spread
from dgpo_fast.models.family import AttentionShape


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGPO_FAST_CACHE", str(tmp_path))
    return tmp_path / FOLDER


def test_measured_once() -> None:
    values = iter([{"torch": 1.0}, {"torch": 2.0}, {"torch": 3.0}])
    assert [remembered({"width": width}, lambda _: next(values)) for width in (1, 1, 2)] == [
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
        found = list(pool.map(lambda value: remembered({"x": 1}, lambda _: measure(value)), range(8)))
    assert len(set(found)) == 1


def test_what_was_measured_under_load_is_measured_again_on_another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two such measurements the steadier one is kept; a steady one stays for good."""
    now = [0.0]
    monkeypatch.setattr("dgpo_fast.engine.remembered.time.time", lambda: now[0])
    rounds = iter([("loaded", [1.0, 2.0, 3.0]), ("worse", [1.0, 4.0, 4.0]), ("steady", [1.0, 1.1, 2.0])])

    def measure(spread: Spread) -> str:
        name, seconds = next(rounds)
        spread.add(seconds)
        return name

    found = []
    for day in (0.0, 0.9, 1.1, 2.2, 9.9):
        now[0] = day * 24 * 3600
        found.append(remembered({"x": 1}, measure))
    assert found == ["loaded", "loaded", "loaded", "steady", "steady"]


def test_other_versions_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter(range(4))

    def measured() -> int:
        return remembered({"x": 1}, lambda _: next(values))

    assert measured() == measured() == 0
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    assert measured() == 1
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99_999)
    assert measured() == 2
    version = remembered_module.metadata.version
    monkeypatch.setattr(
        remembered_module.metadata, "version", lambda name: "99" if name == "xformers" else version(name)
    )
    assert measured() == 3


@pytest.mark.parametrize("damage", ["", "{", '{"key": 1}', "[]"])
def test_a_damaged_file_is_measured_again(damage: str, folder: Path) -> None:
    remembered({"x": 1}, lambda _: 1)
    (path,) = folder.glob("*.json")
    path.write_text(damage)
    assert remembered({"x": 1}, lambda _: 2) == 2
    assert json.loads(path.read_text())["value"] == 2
    assert list(folder.iterdir()) == [path]


def test_without_a_folder_it_is_measured_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DGPO_FAST_CACHE", str(tmp_path / "file"))
    assert [remembered({}, lambda _, value=value: value) for value in (1, 2)] == [1, 2]


def test_attention_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same milliseconds, to the last digit; another machine's threads are another measurement."""
    shapes = (AttentionShape(2, 8, 2, 4, calls=1),)
    first = attention.timings(shapes, torch.device("cpu"), torch.float32)
    assert attention.timings(shapes, torch.device("cpu"), torch.float32) == first
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert attention.timings(shapes, torch.device("cpu"), torch.float32) != first
