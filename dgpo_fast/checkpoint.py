"""Checkpoints that are whole or not there.

A checkpoint is staged in a hidden folder, flushed, hashed and renamed; its manifest is written last. Loading reads
safetensors and JSON alone: nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgpo_fast import __version__
from dgpo_fast.errors import UserError

STATE = "state.safetensors"
MANIFEST = "manifest.json"
PREFIX = "iteration-"
INVALID = (OSError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True)
class State:
    """What a run goes on from.

    Attributes:
        iteration: optimizer steps taken.
        tensors: flat names → tensors on the CPU.
    """

    iteration: int
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix/`, without it."""
        return {n.removeprefix(f"{prefix}/"): t for n, t in self.tensors.items() if n.startswith(f"{prefix}/")}


def save_checkpoint(folder: Path, iteration: int, parts: Mapping[str, Mapping[str, Tensor]], keep: int) -> Path:
    """Writes `folder/iteration-NNNNNN` and removes all but the `keep` newest.

    Args:
        folder: the run's `checkpoints` folder, made if missing.
        iteration: optimizer steps taken.
        parts: name → tensors, stored as `name/tensor`.
        keep: at least 1.

    Raises UserError where the disk refuses; the checkpoints already there stay as they are.
    """
    target = folder / f"{PREFIX}{iteration:06d}"
    if target.exists() and _is_whole(target):
        return target  # the same iteration of a run is the same state
    staging = folder / f".{target.name}"
    tensors = {f"{p}/{n}": t.detach().cpu().contiguous() for p, group in parts.items() for n, t in group.items()}
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_file(tensors, staging / STATE)
        _flush(staging / STATE)
        manifest = {"iteration": iteration, "version": __version__, "sha256": {STATE: _digest(staging / STATE)}}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _flush(staging / MANIFEST)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        _flush(folder)
        for old in _all(folder)[keep:]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        good = next(iter(_all(folder)), None)
        remedy = f"the last good checkpoint is {good}" if good else "no checkpoint was written before"
        raise UserError(
            f"checkpoint {target} could not be saved ({_reason(error)}): {remedy}; free space and resume"
        ) from None
    return target


def load_newest(folder: Path) -> tuple[State, list[str]]:
    """The newest valid checkpoint in `folder`, and a line for each one passed over.

    Raises UserError where none is valid.
    """
    passed_over: list[str] = []
    for path in _all(folder):
        try:
            return _load(path), passed_over
        except INVALID as error:
            passed_over.append(f"passed over {path}: {_reason(error)}")
    why = f" ({passed_over[0]})" if passed_over else ""
    raise UserError(f"{folder}: no valid checkpoint to resume from{why}")


def _is_whole(path: Path) -> bool:
    try:
        _read_manifest(path)
    except INVALID:
        return False
    return True


def _read_manifest(path: Path) -> dict:
    """The manifest of the checkpoint at `path`, whose state matches its checksum; raises one of INVALID otherwise."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if _digest(path / STATE) != manifest["sha256"][STATE]:
        raise ValueError(f"{STATE} does not match its checksum")
    return manifest


def _load(path: Path) -> State:
    manifest = _read_manifest(path)
    with safe_open(path / STATE, framework="pt") as file:
        return State(int(manifest["iteration"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _all(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob(f"{PREFIX}*"), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (
        (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split()) or type(error).__name__
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, by the position of the parameter and the state's name."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": torch.as_tensor(value) for index, slots in state.items() for name, value in slots.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts `optimizer_tensors` back; hyper-parameters stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split("/", 1)
        state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
