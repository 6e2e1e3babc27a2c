"""Moving averages of the trained weights."""

from collections.abc import Mapping

import torch
from torch import Tensor


class MovingAverage:
    """average ← decay · average + (1 − decay) · weights, in fp32.

    Args:
        weights: the trained tensors; the average starts as a copy of them.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights: dict[str, Tensor] = {name: w.detach().float().clone() for name, w in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Moves the average towards `weights`; a decay of 0 copies them."""
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, [weights[name].detach().float() for name in self.weights], 1.0 - decay)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrites the average, as when a run is resumed."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
