"""Checkpoints that are either complete or absent.

A checkpoint is staged in a hidden folder, flushed, hashed and renamed; its manifest is written last. A kill at any
moment leaves earlier checkpoints intact. Loading only reads safetensors and JSON; nothing is unpickled.

`CheckpointWriter` writes in its own thread from a copy of the state in CPU memory, while training continues.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject
from dgpo_fast.wording import one_line

STATE = "state.safetensors"
MANIFEST = "manifest.json"
PREFIX = "iteration-"
MAX_MANIFEST_BYTES = 2**24
NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
INVALID = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError)
Parts = Mapping[str, Mapping[str, Tensor]]
"""What is saved: name of the part → name of the tensor → tensor. Stored as `part/tensor`."""


@dataclass(frozen=True)
class State:
    """What a run resumes from.

    Attributes:
        iteration: optimizer steps taken.
        tensors: flat names → tensors on the CPU.
        info: what else the run wrote into the manifest.
    """

    iteration: int
    tensors: dict[str, Tensor]
    info: JsonObject = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix/`, without it."""
        return {n.removeprefix(f"{prefix}/"): t for n, t in self.tensors.items() if n.startswith(f"{prefix}/")}


class CheckpointWriter:
    """Writes a run's checkpoints while the run continues.

    `save` copies the state to the CPU and returns; a thread writes it. At most one write is under way: the next `save`
    waits for it. Errors in the thread are raised by the next call, as a UserError of one line.

    Args:
        folder: the run's `checkpoints` folder.
        keep: how many of the newest to keep, at least 1.
        info: goes into every manifest: JSON values by name.
    """

    def __init__(self, folder: Path, keep: int, info: Mapping[str, object]):
        self.folder = folder
        self.keep = keep
        self.info = dict(info)
        self.copies: dict[str, Tensor] = {}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.running: Future | None = None

    def save(self, iteration: int, parts: Parts, copied: bool = False, good: int | None = None) -> None:
        """Takes a copy of `parts`, unless they are `copied` already, and has it written as `iteration`'s checkpoint.

        The newest checkpoint until iteration `good` is kept too.
        """
        self.wait()
        names = _flat(parts)
        self.copies = (
            names if copied else {name: _copied(tensor, self.copies.get(name)) for name, tensor in names.items()}
        )
        if any(tensor.is_cuda for tensor in names.values()):
            torch.cuda.current_stream().synchronize()
        self.running = self.thread.submit(_write, self.folder, iteration, self.copies, self.keep, self.info, good)

    def check(self) -> None:
        """Raises errors that have occurred so far, without waiting."""
        if self.running is not None and self.running.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk; raises UserError if it is not."""
        running, self.running = self.running, None
        if running is not None:
            running.result()


def _copied(tensor: Tensor, before: Tensor | None) -> Tensor:
    """A copy on the CPU, in the memory of the copy before it if that fits; from a GPU still on its way."""
    tensor = tensor.detach()
    if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
        before = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return before.copy_(tensor, non_blocking=True)


def _flat(parts: Parts) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for part, group in parts.items() for name, tensor in group.items()}


def _write(
    folder: Path, iteration: int, tensors: dict[str, Tensor], keep: int, info: Mapping[str, object], good: int | None
) -> Path:
    target = folder / f"{PREFIX}{iteration:06d}"
    if target.exists() and _is_whole(target):
        return target  # the same iteration of a run is the same state
    staging = folder / f".{target.name}"
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f".{PREFIX}*"):  # of a process that was killed while it saved
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
        save_file(tensors, staging / STATE)
        _flush(staging / STATE)
        manifest = {"iteration": iteration, "sha256": {STATE: _digest(staging / STATE)}, "info": dict(info)}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _flush(staging / MANIFEST)
        if target.exists():
            _remove(target)
        staging.rename(target)
        _flush(folder)
        _keep_newest(folder, iteration, keep, good)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(_refusal(target, error)) from None
    return target


def _keep_newest(folder: Path, iteration: int, keep: int, good: int | None) -> None:
    """Removes the checkpoints that are too old, but for the newest until iteration `good`, and those of later
    iterations, which this run skipped as broken."""
    earlier = [path for path in _all(folder) if _iteration(path) <= iteration]
    kept = [*earlier[:keep], None if good is None else newest_until(folder, good)]
    for path in _all(folder):
        if path not in kept:
            _remove(path)


def newest_until(folder: Path, iteration: int) -> Path | None:
    """The newest checkpoint in `folder` that is not of an iteration after `iteration`; None if there is none."""
    return next((path for path in _all(folder) if _iteration(path) <= iteration), None)


def _remove(path: Path) -> None:
    """Hides it first: a kill in the middle leaves no partial checkpoint under its name."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _refusal(target: Path, error: Exception) -> str:
    folder = target.parent
    if not folder.parent.is_dir():
        return f"the run's folder {folder.parent} is gone: nothing can be saved there; start the run again"
    good = next(iter(_all(folder)), None)
    remedy = f"the last good checkpoint is {good}" if good else "no checkpoint was written before"
    return f"checkpoint {target} could not be saved ({_reason(error)}): {remedy}; free space and resume"


def load_newest(folder: Path, until: int | None = None) -> tuple[State, list[str]]:
    """The newest valid checkpoint in `folder`, or of those `until` an iteration, and a line for each one passed over.

    Raises UserError if none is valid.
    """
    passed_over: list[str] = []
    for path in _all(folder):
        if until is not None and _iteration(path) > until:
            continue
        try:
            return _load(path), passed_over
        except INVALID as error:
            passed_over.append(f"passed over {path}: {_reason(error)}")
    why = f" ({passed_over[0]})" if passed_over else ""
    raise UserError(f"{folder}: no valid checkpoint to resume from{why}")


def newest_info(folder: Path) -> JsonObject:
    """What the newest manifest in `folder` says of the run, without a look at its state; nothing if there is none."""
    for path in _all(folder):
        try:
            return dict(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["info"])
        except INVALID:
            continue
    return {}


def _is_whole(path: Path) -> bool:
    try:
        _read_manifest(path)
    except INVALID:
        return False
    return True


def _read_manifest(path: Path) -> dict:
    """The manifest of the checkpoint at `path`, whose state matches its checksum; raises one of INVALID otherwise."""
    if (path / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if path.name != f"{PREFIX}{manifest['iteration']:06d}":
        raise ValueError(f"{MANIFEST} is that of another iteration")
    if _digest(path / STATE) != manifest["sha256"][STATE]:
        raise ValueError(f"{STATE} does not match its checksum")
    return manifest


def _load(path: Path) -> State:
    manifest = _read_manifest(path)
    with safe_open(path / STATE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return State(int(manifest["iteration"]), tensors, dict(manifest.get("info", {})))


def _all(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=_iteration, reverse=True)


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Has a file's content, or a folder's names, written to the disk. Windows and some network and FUSE file systems
    refuse this for folders, and keep their names in their own way."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in NO_FOLDER_SYNC:
            raise


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error) or type(error).__name__
