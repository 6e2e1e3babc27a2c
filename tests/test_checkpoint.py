"""Checkpoints: whole or absent, written beside the training, and never unpickled."""

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dgpo_fast.errors import UserError
from dgpo_fast.run import checkpoint
from dgpo_fast.run.checkpoint import CheckpointWriter, load_newest
from dgpo_fast.run.folder import FolderLock
from tests.checkpoints import save_checkpoint


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"w": torch.full((3, 2), value)}, "optimizer": {"0/step": torch.tensor(value)}}


def test_a_writer_saves_what_was_there_when_it_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may change the weights while they are written."""
    go = threading.Event()
    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: go.wait(30) and original(*args))
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=2, info={"code": "x"})
    state = parts(1.0)
    writer.save(1, state)
    state["policy"]["w"].fill_(9.0)
    assert not (tmp_path / "checkpoints/iteration-000001").exists(), "the caller did not wait for the disk"
    writer.check()
    go.set()
    writer.wait()
    loaded, passed_over = load_newest(tmp_path / "checkpoints")
    assert not passed_over and loaded.iteration == 1 and loaded.info == {"code": "x"}
    assert loaded.part("policy")["w"].eq(1.0).all() and float(loaded.part("optimizer")["0/step"]) == 1.0


def test_what_goes_wrong_in_the_writer_is_said_by_the_next_call(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=2, info={})
    writer.save(1, parts(1.0))
    writer.wait()
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    (tmp_path / "checkpoints").write_text("a file in the way")
    writer.save(2, parts(2.0))
    with pytest.raises(UserError, match="iteration-000002 could not be saved"):
        for _ in range(500):
            writer.check()
            time.sleep(0.01)


def test_a_folder_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", keep=2, info={})
    writer.save(1, parts(1.0))
    with pytest.raises(UserError, match=r"the run's folder .*run is gone"):
        writer.wait()
    assert not (tmp_path / "run").exists()


def test_the_newest_are_kept_and_broken_later_ones_are_not_counted(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for iteration in (1, 2, 3, 40):
        save_checkpoint(folder, iteration, parts(iteration), keep=9)
    (folder / "iteration-000040/state.safetensors").write_bytes(b"broken")
    state, passed_over = load_newest(folder)
    assert state.iteration == 3 and len(passed_over) == 1 and "iteration-000040" in passed_over[0]
    save_checkpoint(folder, 4, parts(4), keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["iteration-000003", "iteration-000004"]


def test_iterations_are_sorted_as_numbers(tmp_path: Path) -> None:
    for iteration in (999_999, 1_000_000):
        save_checkpoint(tmp_path / "checkpoints", iteration, parts(0), keep=9)
    assert load_newest(tmp_path / "checkpoints")[0].iteration == 1_000_000


SAVE_FOREVER = """
import itertools, sys, torch
from pathlib import Path
from dgpo_fast.run.checkpoint import CheckpointWriter, load_newest
writer = CheckpointWriter(Path(sys.argv[1]), keep=2, info={})
for iteration in itertools.count(int(sys.argv[2])):
    writer.save(iteration, {"policy": {"w": torch.full((200, 1000), float(iteration))}})
    if iteration == int(sys.argv[2]):
        writer.wait()
        print("ready", flush=True)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    """A process that does nothing but save is killed again and again; the newest checkpoint is always whole."""
    folder, start = tmp_path / "checkpoints", 1
    process = None
    for round_ in range(5):
        arguments = [sys.executable, "-c", SAVE_FOREVER, str(folder), str(start)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.037 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        state, passed_over = load_newest(folder)
        assert not passed_over, passed_over
        assert state.part("policy")["w"].eq(state.iteration).all() and state.iteration >= start
        start = state.iteration + 1
    save_checkpoint(folder, start, parts(start), keep=1)
    assert [path.name for path in folder.iterdir()] == [f"iteration-{start:06d}"], "leftovers are cleared away"


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
def test_a_pickle_in_a_checkpoint_is_not_executed(file: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 1, parts(1.0), keep=1)
    (path / file).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    if file == "state.safetensors":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["sha256"][file] = checkpoint._digest(path / file)
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"no valid checkpoint to resume from \(passed over .*iteration-000001: "):
        load_newest(tmp_path / "checkpoints")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "manifest",
    ["[" * 100_000, "{}", "[]", '{"iteration": 7, "sha256": {}}', '{"iteration": "../1", "sha256": {}}', "\x00"],
)
def test_a_malicious_manifest_is_passed_over_in_one_line(manifest: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 1, parts(1.0), keep=1)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError) as error:
        load_newest(tmp_path / "checkpoints")
    assert "\n" not in str(error.value)


def test_a_folder_is_locked_by_one_process_and_free_after_its_death(tmp_path: Path) -> None:
    holding = (
        "from pathlib import Path; from dgpo_fast.run.folder import FolderLock\n"
        f"held = FolderLock(Path({str(tmp_path)!r}))\n"
        "print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on .* is at work in it"):
        FolderLock(tmp_path)
    process.kill()
    process.wait()
    FolderLock(tmp_path).release()
