"""One run's folder, one process that trains in it."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from dgpo_fast.errors import UserError

LOCK = ".lock"


class FolderLock:
    """Holds `folder` until this process ends, however it ends: the kernel lets go of the lock.

    Args:
        folder: the run's folder.
        note: JSON values to leave in the lock, for whoever comes next; see `read_lock`.

    Raises UserError where another process holds it.
    """

    def __init__(self, folder: Path, note: dict[str, Any] | None = None):
        self.file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = read_lock(folder)
            self.file.close()
            raise UserError(
                f"{folder}: process {holder.get('pid', '?')} on {holder.get('host', '?')} is at work in it; "
                "wait for it, or stop it, before you go on"
            ) from None
        content = {"pid": os.getpid(), "host": socket.gethostname(), **(note or {})}
        self.file.truncate(0)
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()

    def release(self) -> None:
        """Lets go before the process ends."""
        self.file.close()


def read_lock(folder: Path) -> dict[str, Any]:
    """What the process that holds or held `folder` left in its lock; empty where there is nothing to read."""
    try:
        content = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
