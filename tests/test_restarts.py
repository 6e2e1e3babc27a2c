"""Under torchrun, a run that was begun before is gone on with, and no other is taken for it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.run.folder import FolderLock, read_lock
from dgpo_fast.run.start import read_start
from dgpo_fast.train import train

ARGS = ["small.yaml", "--iterations", "2"]
Launched = Callable[[str, int], None]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> Launched:
    """Sets what torchrun tells its processes: its `--rdzv-id`, and how often it has restarted them."""

    def launched(run_id: str, restarts: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))

    return launched


def test_who_goes_on(launched: Launched) -> None:
    """torchrun's restart; a job that its cluster starts again with the same command; nobody else."""
    launched("job-7", 0)
    assert train(ARGS) == 0
    for restarts in (0, 1):
        launched("job-7", restarts)
        start = read_start(ARGS)
        assert (start.resumed, start.folder, start.config.iterations) == (True, Path("runs/run"), 2)
    launched("job-7", 0)
    with pytest.raises(UserError, match="runs/run exists"):
        read_start([*ARGS, "--optimizer.lr", "1e-5"])
    for other in ("job-8", "none"):
        launched(other, 0)
        with pytest.raises(UserError, match="runs/run exists"):
            read_start(ARGS)


def test_a_job_is_known_by_what_its_command_asked_for(launched: Launched) -> None:
    """The shift is the model's own then, and the card has not chosen its settings; resuming changes nothing of that."""
    args = [*ARGS, "--card", "24GB"]
    launched("job-7", 0)
    assert train(args) == 0
    for _ in range(2):
        assert read_start(args).resumed
        assert train(args) == 0
    for other in (ARGS, [*args, "--rollout.shift", "3"]):
        with pytest.raises(UserError, match="runs/run exists"):
            read_start(other)


def test_a_run_without_a_checkpoint_begins_again(launched: Launched) -> None:
    """Unless a process is still at work in it."""
    launched("job-7", 0)
    assert train(ARGS) == 0
    shutil.rmtree("runs/run/checkpoints")
    note = read_lock(Path("runs/run"))
    lock = FolderLock(Path("runs/run"), note)
    with pytest.raises(UserError, match="is at work in it"):
        read_start(ARGS)
    lock.release()
    FolderLock(Path("runs/run"), note).release()
    assert not read_start(ARGS).resumed and not Path("runs/run").exists()
