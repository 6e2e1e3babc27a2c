"""The lock of a run's folder: who may hold it, what it leaves, and file systems that have none."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.run import folder
from dgpo_fast.run.folder import FolderLock, read_lock


def test_one_holds_it_and_says_who_it_is(tmp_path: Path) -> None:
    """In the same process, too; what was left is read during the hold and after it."""
    assert read_lock(tmp_path) == {}
    lock = FolderLock(tmp_path, {"launcher": "job-7"})
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is at work in it"):
        FolderLock(tmp_path)
    assert read_lock(tmp_path)["launcher"] == "job-7"
    lock.release()
    assert read_lock(tmp_path)["launcher"] == "job-7"
    FolderLock(tmp_path).release()
    assert read_lock(tmp_path).keys() == {"pid", "host"}


def test_processes_that_the_holder_starts_do_not_hold_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    command = [sys.executable, "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        lock.release()
        FolderLock(tmp_path).release()
        child.kill()


def test_what_an_earlier_version_wrote_into_the_lock_is_read(tmp_path: Path) -> None:
    """While it holds the lock, too."""
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / folder.LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(json.dumps({"pid": 7, "host": "far", "launcher": "job-7"}))
        file.flush()
        with pytest.raises(UserError, match="process 7 on far is at work in it"):
            FolderLock(tmp_path)
    assert read_lock(tmp_path)["launcher"] == "job-7"
    FolderLock(tmp_path, {"launcher": "job-8"}).release()
    assert read_lock(tmp_path)["launcher"] == "job-8"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_note(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_locks(descriptor: int, *, blocking: bool) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder, "lock_descriptor", without_locks)
    FolderLock(tmp_path, {"launcher": "job-7"}).release()
    assert read_lock(tmp_path)["launcher"] == "job-7"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"note: {tmp_path}: its file system has no locks (")


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int, *, blocking: bool) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(UserError, match=r"missing/\.lock: cannot be written \(No such file or directory\)"):
        FolderLock(tmp_path / "missing")
    monkeypatch.setattr(folder, "lock_descriptor", fails)
    with pytest.raises(UserError, match=r"\.lock: cannot be written \(Input/output error\)"):
        FolderLock(tmp_path)
