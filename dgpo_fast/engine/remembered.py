"""Measurements made once on a machine.

Kernels that differ in speed also differ in rounding. If every run measured again, two runs of one seed could choose
different kernels and drift apart in their last bits.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import diffusers
import torch

from dgpo_fast.models.prompt_cache import default_folder

FOLDER = "measured"
Measured = TypeVar("Measured")
"""Anything that JSON keeps as it is."""


def remembered(what: Mapping[str, object], measure: Callable[[], Measured]) -> Measured:
    """What `measure` returned when it was first asked for `what` on this machine.

    If two processes measure at the same time, both get the result of the one that finished first. If the user's cache
    folder cannot be read or written, every process measures for itself.

    Args:
        what: is measured, as JSON; device, threads, machine and versions are added here.
        measure: returns something that JSON keeps as it is.
    """
    key = json.dumps({**what, **_machine()}, sort_keys=True)
    path = default_folder() / FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    kept = _read(path)
    if kept is None:
        kept = json.loads(json.dumps(measure()))
        if _publish(path, {"key": json.loads(key), "value": kept}):
            return kept
        first = _read(path)
        kept = kept if first is None else first
    return kept


def _machine() -> dict[str, object]:
    return {
        "node": platform.node(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["value"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: then it is measured again
        return None


def _publish(path: Path, content: dict[str, object]) -> bool:
    """Whether `content` is now at `path`, whole; not if another process was first, or nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _read(path) is None:
            path.unlink()
        with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.link(file.name, path)
        return True
    except OSError:
        return False
