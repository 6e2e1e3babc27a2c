"""Folders: a run's, in which one process trains, and those that are written whole or not at all."""

import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor
from safetensors import SafetensorError

from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject
from dgpo_fast.wording import one_line

LOCK = ".lock"
HOLDER = ".lock.json"
"""Says who holds the lock. A separate file, since Windows does not allow reading a locked file."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class FolderLock:
    """Locks `folder` until this process ends; the kernel releases the lock in any case.

    If the file system has no locks, prints a note on stderr and locks nothing.

    Args:
        folder: the run's folder.
        note: JSON values to store with the lock; `read_lock` returns them.

    Raises:
        UserError: another process holds the folder, or its lock cannot be written.
    """

    def __init__(self, folder: Path, note: JsonObject | None = None):
        try:
            self.file = (folder / LOCK).open("ab")
            if not _lock(self.file.fileno(), folder):
                self.file.close()
                holder = read_lock(folder)
                raise UserError(
                    f"{folder}: process {holder.get('pid', '?')} on {holder.get('host', '?')} is at work in it; "
                    "wait for it, or stop it, before you go on"
                )
            content = {"pid": os.getpid(), "host": socket.gethostname(), **(note or {})}
            (folder / HOLDER).write_text(json.dumps(content) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder / LOCK}: cannot be written ({error.strerror}): fix it, or its folder") from None

    def release(self) -> None:
        """Releases the lock before the process ends."""
        self.file.close()


def read_lock(folder: Path) -> JsonObject:
    """The note of the process that holds or held `folder`; empty if there is none."""
    for name in (HOLDER, LOCK):  # earlier versions wrote it into the lock itself
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        return content if isinstance(content, dict) else {}
    return {}


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether no other process holds the lock. When this process ends, the lock is released."""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"note: {folder}: its file system has no locks ({error.strerror}): let no other process work in it",
            file=sys.stderr,
        )
        return True


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into. It becomes `folder` at the end of the block; if the block fails, it is removed.

    Raises UserError if `folder` exists or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists: choose another folder")
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staged.mkdir(parents=True)
        yield staged
        staged.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # renamed, unless something failed
