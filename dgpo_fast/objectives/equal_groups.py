"""Groups of equal rewards: they prefer no image, so only what holds the policy at the base gives them a
gradient."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgpo_fast.distributed import BatchPart
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.objectives.batch import Batch, add_metrics

OF_ALL_GROUPS = ("loss", "kl", "norm_hinge")
Learn = Callable[[Batch], dict[str, Tensor]]
"""Adds the gradient of some of the groups, and returns their part of the metrics' means over all groups."""


@dataclass(frozen=True)
class SortedGroups:
    """A process's samples, sorted by whether their group prefers anything.

    Attributes:
        preferring: groups with some advantage; None if there are none.
        equal: groups whose advantages are all exactly 0; None if there are none.
        preferring_share: of all processes' groups, those with some advantage.
    """

    preferring: Batch | None
    equal: Batch | None
    preferring_share: float

    def learn(self, preferring: Learn, equal: Learn) -> dict[str, Tensor]:
        """Trains on each kind with its own function.

        Returns means over samples: `loss`, `kl` and `norm_hinge` of all groups, the others of those that prefer.
        """
        totals: dict[str, Tensor] = {}
        if self.preferring is not None:
            metrics = preferring(self.preferring)
            shares = {name: 1.0 if name in OF_ALL_GROUPS else self.preferring_share for name in metrics}
            totals = {name: value / shares[name] for name, value in metrics.items()}
        if self.equal is not None:
            metrics = equal(self.equal)
            add_metrics(totals, {name: metrics[name] for name in OF_ALL_GROUPS if name in metrics}, 1.0)
        return totals


def sort_groups(batch: Batch) -> SortedGroups:
    """Sorts `batch`; all of it counts as preferring if processes work in step: they share groups or weights."""
    part = batch.part or BatchPart(0, batch.groups, batch.group_size, batch.advantage.cpu())
    if part.in_step:
        return SortedGroups(batch, None, 1.0)
    equal = (part.advantage.reshape(-1, batch.group_size) == 0).all(1)
    if not equal.any():
        return SortedGroups(batch, None, 1.0)
    mine = equal.repeat_interleave(batch.group_size)[part.first : part.first + len(batch.x0)]
    return SortedGroups(_some(batch, part, ~mine), _some(batch, part, mine), 1.0 - float(equal.double().mean()))


def _some(batch: Batch, part: BatchPart, chosen: torch.Tensor) -> Batch | None:
    """The chosen samples, which know how many there are of all groups."""
    if not chosen.any():
        return None
    return replace(batch[chosen.nonzero()[:, 0].to(batch.x0.device)], part=part)


def zero_gradients(models: PolicyModels) -> None:
    """Gives weights that have no gradient one of 0: without one, the optimizer's step would be left out."""
    for weight in models.weights.values():
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype) if weight.grad is None else weight.grad
