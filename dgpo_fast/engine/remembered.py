"""Measurements made once on a machine.

Kernels that differ in speed also differ in rounding. If every run measured again, two runs of one seed could choose
different kernels and drift apart in their last bits. Only what was measured while other programs disturbed it is
measured again, on another day.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import torch

from dgpo_fast.engine.timing import Spread
from dgpo_fast.models.prompt_cache import default_folder

FOLDER = "measured"
PACKAGES = ("torch", "diffusers", "flash-attn", "flash-attn-3", "xformers", "kernels")
STEADY = 1.3
"""Median over best of the rounds, at most: beside a busy process it is more."""
UNSTEADY_KEPT_S = 24 * 3600.0
"""Runs of one day agree with each other, whatever else the machine does."""
Measured = TypeVar("Measured")
"""Anything that JSON keeps as it is."""


def remembered(what: Mapping[str, object], measure: Callable[[Spread], Measured]) -> Measured:
    """What `measure` returned when it was first asked for `what` on this machine.

    If its rounds lay further apart than `STEADY`, that is kept for `UNSTEADY_KEPT_S`; then it is measured again, and
    the steadier of the two measurements is kept. If two processes measure at the same time, both get the result of the
    one that finished first. If the user's cache folder cannot be read or written, every process measures for itself.

    Args:
        what: is measured, as JSON; device, threads, machine and versions are added here.
        measure: returns something that JSON keeps as it is, and tells its argument how far its rounds lay apart.
    """
    key = json.dumps({**what, **_machine()}, sort_keys=True)
    path = default_folder() / FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    kept = _read(path)
    if kept is not None and (kept["spread"] <= STEADY or time.time() - kept["time"] < UNSTEADY_KEPT_S):
        return kept["value"]
    spread = Spread()
    found = {"key": json.loads(key), "value": json.loads(json.dumps(measure(spread)))}
    found |= {"spread": spread.largest, "time": time.time()}
    if kept is not None and kept["spread"] < spread.largest:
        found |= {"value": kept["value"], "spread": kept["spread"]}
    if _publish(path, found, instead_of=kept):
        return found["value"]
    first = _read(path)
    return found["value"] if first is None else first["value"]


def _machine() -> dict[str, object]:
    return {
        "node": platform.node(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {"value": kept["value"], "spread": float(kept["spread"]), "time": float(kept["time"])}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: then it is measured again
        return None


def _publish(path: Path, content: dict[str, Any], instead_of: dict[str, Any] | None) -> bool:
    """Whether `content` is now at `path`, whole; not if another process was first, or nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _read(path) == instead_of:
            path.unlink(missing_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.link(file.name, path)
        return True
    except OSError:
        return False
