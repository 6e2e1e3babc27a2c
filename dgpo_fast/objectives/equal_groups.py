"""Groups of equal rewards: they prefer no image to another, and only a KL term reaches the weights through them."""

from dataclasses import dataclass, replace

import torch

from dgpo_fast.distributed import BatchPart
from dgpo_fast.objectives import Batch


@dataclass(frozen=True)
class Sorted:
    """A process's samples, sorted by whether their group prefers anything.

    Attributes:
        preferring: groups with some advantage; None where there are none.
        equal: groups whose advantages are all exactly 0; None where there are none.
        preferring_share: of all processes' groups, those with some advantage.
    """

    preferring: Batch | None
    equal: Batch | None
    preferring_share: float


def sort_groups(batch: Batch) -> Sorted:
    """Sorts `batch`; all of it counts as preferring where processes work in step: they share groups or weights."""
    part = batch.part or BatchPart(0, batch.groups, batch.group_size, batch.advantage.cpu())
    if part.split or part.edges is not None:
        return Sorted(batch, None, 1.0)
    equal = (part.advantage.reshape(-1, batch.group_size) == 0).all(1)
    if not equal.any():
        return Sorted(batch, None, 1.0)
    mine = equal.repeat_interleave(batch.group_size)[part.first : part.first + len(batch.x0)]
    return Sorted(_some(batch, part, ~mine), _some(batch, part, mine), 1.0 - float(equal.double().mean()))


def _some(batch: Batch, part: BatchPart, chosen: torch.Tensor) -> Batch | None:
    """The chosen samples, which know how many there are of all groups."""
    if not chosen.any():
        return None
    return replace(batch[chosen.nonzero()[:, 0].to(batch.x0.device)], part=part)
