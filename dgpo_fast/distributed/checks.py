"""Checks that all processes hold the same weights and counters."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from dgpo_fast.distributed.processes import Processes, SharedError

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DriftError(SharedError):
    """Processes that should hold the same weights hold different ones. They must not be saved."""


@torch.no_grad()
def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names and bits. On a GPU it reads every tensor once and waits for the device once.

    A tensor's bits are added up as integers, so any single change shows, on every device and in any order of addition.
    """
    digest = hashlib.sha256("\n".join(tensors).encode())
    if tensors:
        sums = [
            tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
            for tensor in tensors.values()
        ]
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(state: Mapping[str, object], processes: Processes, when: str) -> None:
    """Raises DriftError if a process's `state` (JSON values by name) differs from process 0's."""
    states = processes.gather(dict(state), f"the checksums {when}")
    for rank, theirs in enumerate(states):
        differing = [name for name, value in theirs.items() if value != states[0][name]]
        if differing:
            raise DriftError(
                f"{when}: process {rank} has other {', '.join(differing)} than process 0: a machine computes wrongly, "
                "or the processes run different code; go on from the last checkpoint with --resume on sound machines"
            )
