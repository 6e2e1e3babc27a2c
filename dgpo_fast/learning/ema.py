"""Moving averages of the trained weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

TENSORS_AT_ONCE = 64
"""Few enough that the fp32 values of bf16 weights stay small beside the weights."""


def ramp(step: int, *, per_step: float, largest: float, start: float = 0.0, delay: int = 0) -> float:
    """A decay that grows with the optimizer steps taken: min(largest, start + per_step · max(0, step − delay))."""
    return min(largest, start + per_step * max(step - delay, 0))


class MovingAverage:
    """average ← decay · average + (1 − decay) · weights, in fp32.

    Args:
        weights: the trained tensors; the average starts as a copy of them.
        device: where the average is kept; where the weights are by default.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | None = None):
        self.weights: dict[str, Tensor] = {
            name: weight.detach().to(device or weight.device, torch.float32, copy=True)
            for name, weight in weights.items()
        }

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Moves the average towards `weights`; a decay of 0 copies them."""
        names = list(self.weights)
        for start in range(0, len(names), TENSORS_AT_ONCE):
            some = names[start : start + TENSORS_AT_ONCE]
            values = [weights[name].detach().to(self.weights[name].device, torch.float32) for name in some]
            torch._foreach_lerp_([self.weights[name] for name in some], values, 1.0 - decay)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrites the average, as when a run is resumed."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
