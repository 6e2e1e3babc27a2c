"""Velocities of a batch: one forward of a transformer, with guidance or without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import cast

import torch
from torch import Tensor, nn

from dgpo_fast.models.family import Guidance, Rows, family_of
from dgpo_fast.models.text_embeds import TextEmbeds

AROUND = "dgpo_around"
"""The attribute in which a transformer carries what is called around its forwards."""


@dataclass(frozen=True)
class Given:
    """What one forward reads: R rows of each.

    Attributes:
        x_t: (R, C, H, W) noisy latents.
        timestep: (R,), in [0, 1000].
        condition: (R, …) tensors of the prompts.
        embedded: (R,), the number for guidance that the transformer reads; None if it reads none.
    """

    x_t: Tensor
    timestep: Tensor
    condition: Rows
    embedded: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_t)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Given":
        """All tensors changed alike."""
        embedded = None if self.embedded is None else change(self.embedded)
        condition = {name: change(rows) for name, rows in self.condition.items()}
        return Given(change(self.x_t), change(self.timestep), condition, embedded)


Forward = Callable[[Given], Tensor]
"""Velocities (R, C, H, W)."""
Around = Callable[[Forward, Given], Tensor]
"""Calls the forward that it gets, with what it is given or with something else, and returns the velocities."""


def predict(transformer: nn.Module, x_t: Tensor, timestep: Tensor, text: TextEmbeds) -> Tensor:
    """Velocity v(x_t, t, c), (B, C, H, W), in the transformer's dtype.

    Args:
        transformer: carries its family.
        x_t: (B, C, H, W) noisy latents, any float dtype.
        timestep: () or (B,), in [0, 1000].
        text: the B prompts.
    """
    return velocity(transformer, _given(x_t, timestep.expand(len(x_t)), text.gathered(), text.embedded))


def predict_pair(transformer: nn.Module, x_t: Tensor, timestep: Tensor, text: TextEmbeds) -> tuple[Tensor, Tensor]:
    """Velocities of the prompts and of their negative prompts in one forward of 2B samples, for guidance.

    Args:
        transformer: carries its family.
        x_t: (B, C, H, W) noisy latents, any float dtype.
        timestep: () or (B,), in [0, 1000].
        text: the B prompts, with their negative prompts.
    """
    timestep, both = timestep.expand(len(x_t)).repeat(2), torch.cat([x_t, x_t])
    both = velocity(transformer, _given(both, timestep, text.gathered_pairs(), text.embedded))
    conditional, negative = both.chunk(2)
    return conditional, negative


def guided(transformer: nn.Module, conditional: Tensor, negative: Tensor, scale: float) -> Tensor:
    """The guided velocity (B, C, H, W): v_neg + g·(v_cond − v_neg) with g = `scale`, then the rule of the family."""
    return Guidance(scale, rule=family_of(transformer).rule).combine(conditional, negative)


def call_around(transformer: nn.Module, around: Around, *, innermost: bool = False) -> None:
    """Has `around` called around each forward of `transformer`, outside of those that are there, or inside of them."""
    there = _around(transformer)
    transformer.__dict__[AROUND] = [*there, around] if innermost else [around, *there]


@contextmanager
def called_around(transformer: nn.Module, around: Around, *, innermost: bool = False) -> Iterator[None]:
    """`call_around` during the block."""
    call_around(transformer, around, innermost=innermost)
    try:
        yield
    finally:
        transformer.__dict__[AROUND] = [each for each in _around(transformer) if each is not around]


def _around(transformer: nn.Module) -> list[Around]:
    return cast(list[Around], transformer.__dict__.get(AROUND, []))


def velocity(transformer: nn.Module, given: Given) -> Tensor:
    """Velocities (R, C, H, W) of R rows, in the transformer's dtype: the one way to `Family.velocity`."""
    forward: Forward = partial(_of_family, transformer)
    forward = reduce(lambda inner, around: partial(around, inner), reversed(_around(transformer)), forward)
    return forward(given)


def _given(x_t: Tensor, timestep: Tensor, condition: Rows, embedded: float | None) -> Given:
    number = None if embedded is None else torch.full((len(x_t),), embedded, device=x_t.device)
    return Given(x_t, timestep, condition, number)


def _of_family(transformer: nn.Module, given: Given) -> Tensor:
    return family_of(transformer).velocity(transformer, given.x_t, given.timestep, given.condition, given.embedded)


def wide(velocity: Tensor) -> Tensor:
    """In fp32, or as it is if it is wider."""
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


def batch_slices(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `total` rows in order."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
