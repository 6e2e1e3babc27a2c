"""Skips optimizer steps that must not be taken, on all processes together."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dgpo_fast.distributed.processes import Processes, SharedError
from dgpo_fast.records import JsonObject


class StepGuard:
    """Skips the steps whose gradient is not finite, and ends the run after too many in a row.

    A NaN on one process makes the summed gradient NaN on all of them, so all decide alike without communication.

    Args:
        limit: skipped steps in a row that end the run.
        processes: those of the run.
        dtype: of the model's forwards.
        note: called with one line for every skipped step.
    """

    def __init__(self, limit: int, processes: Processes, dtype: torch.dtype, note: Callable[[str], None]):
        self.limit, self.processes, self.dtype, self.note = limit, processes, dtype, note
        self.in_a_row, self.taken = 0, False

    def allows(self, norm: Tensor, own_norm: Tensor, iteration: int) -> bool:
        """Whether the step is to be taken.

        Args:
            norm: of the summed gradient, the same on all processes.
            own_norm: of this process's part, which tells whose gradient is not finite.
            iteration: counted from 1, for messages.

        Raises SharedError at the limit.
        """
        if math.isfinite(float(norm)):
            self.in_a_row, self.taken = 0, True
            return True
        self.in_a_row += 1
        finite = self.processes.gather(math.isfinite(float(own_norm)), f"the gradients of iteration {iteration}")
        guilty = [str(rank) for rank, fine in enumerate(finite) if not fine]
        whose = f" (process {', '.join(guilty)})" if guilty and self.processes.count > 1 else ""
        line = f"iteration {iteration}: the gradient is not finite{whose}; its step was not taken"
        self.note(line)
        if self.in_a_row >= self.limit:
            begun = self.taken or iteration > self.in_a_row
            raise SharedError(f"{line}, the {self.in_a_row}. in a row: {finite_remedy(self.dtype, begun=begun)}")
        return False


def finite_remedy(dtype: torch.dtype, *, begun: bool) -> str:
    """What to do if a model gives numbers that are not finite.

    Args:
        dtype: of its forwards.
        begun: whether it has been trained.
    """
    fp32 = "" if dtype == torch.float32 else "--precision fp32"
    if begun:
        return f"resume with a lower --optimizer.lr{fp32 and ' or ' + fp32}"
    return f"use {fp32}, or another model" if fp32 else "the model fails in fp32 already, so use another one"


def gradient_norm(weights: Mapping[str, nn.Parameter]) -> Tensor:
    """The norm of this process's own gradients, on their device; 0 if there are none."""
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) if gradients else torch.zeros(())


def damage(weights: Mapping[str, Tensor]) -> JsonObject:
    """For a dump: how many weights are not finite, and the largest of the others."""
    return {
        name: {
            "not_finite": int((~torch.isfinite(weight)).sum()),
            "largest": weight.numel() and float(torch.nan_to_num(weight.detach().float(), 0.0, 0.0, 0.0).abs().max()),
        }
        for name, weight in weights.items()
    }
