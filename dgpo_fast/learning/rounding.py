"""Weights kept in bf16 whose updates are not lost.

A bf16 weight has 8 significant bits: an update below 1/512 of it vanishes if the sum is rounded to the nearest
number. Two remedies, both with the optimizer's arithmetic in fp32:

* `StochasticRounding`: up or down with probabilities given by the distances, so that the mean of many small updates
  is right. 2 bytes per weight. Its bits are Philox-4x32-10's at (seed, step, weight, element), so a resumed run rounds
  as an uninterrupted one.
* `SplitMaster`: an fp32 weight whose upper half is the bf16 weight and whose lower half is stored separately. 4 bytes
  per weight, instead of 6 with a separate fp32 master, and exactly the same training.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from dgpo_kernels.reference import WORD, philox_4x32
from torch import Tensor

BITS_PER_COUNTER = 8
"""16-bit numbers in the four words of one Philox counter."""


class Rounding(Protocol):
    """How fp32 values become bf16 weights and are found again."""

    def widen(self, index: int, weight: Tensor) -> Tensor:
        """The fp32 value of weight `index`, a new tensor."""
        ...

    def narrow(self, index: int, value: Tensor, weight: Tensor, step: int) -> None:
        """Writes the fp32 `value` into the bf16 `weight`, in place. `step` counts the optimizer's steps from 0."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold beside the bf16 weights."""
        ...

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Puts `tensors` back."""
        ...


class NearestRounding:
    """Rounds to the nearest bf16 number. It loses small updates; it is only for comparison."""

    def widen(self, index: int, weight: Tensor) -> Tensor:
        return weight.float()

    def narrow(self, index: int, value: Tensor, weight: Tensor, step: int) -> None:
        weight.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        pass


class StochasticRounding(NearestRounding):
    """Rounds up or down with probabilities given by the distances.

    Args:
        seed: 63-bit key of the random bits.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def narrow(self, index: int, value: Tensor, weight: Tensor, step: int) -> None:
        rounded = [
            stochastic_bf16(part, random_16bit(self.seed, step, index, number, len(part), value.device))
            for number, part in enumerate(value.reshape(-1).split(CHUNK))
        ]
        weight.copy_(torch.cat(rounded).view_as(weight))


class SplitMaster:
    """An fp32 master in two halves, the bf16 weight (rounded to nearest) and the 16 bits below it."""

    def __init__(self) -> None:
        self.low: dict[int, Tensor] = {}

    def widen(self, index: int, weight: Tensor) -> Tensor:
        low = self.low.get(index)
        return weight.float() if low is None else join_fp32(weight, low)

    def narrow(self, index: int, value: Tensor, weight: Tensor, step: int) -> None:
        high, low = split_fp32(value)
        weight.copy_(high)
        self.low.setdefault(index, low).copy_(low)

    def tensors(self) -> dict[str, Tensor]:
        return {str(index): low for index, low in self.low.items()}

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.low = {int(index): low.to(device) for index, low in tensors.items()}


CHUNK = 2**24
"""Weights rounded at once: the random bits of these take 300 MiB while they are made."""


def stochastic_bf16(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 → bf16, away from zero with probability (distance to the number below) / (distance between both).

    Adding a uniform 16-bit number to the lower half carries into the upper half with just that probability.

    Args:
        value: finite fp32, any shape.
        bits: int32 in [0, 2¹⁶), same shape.
    """
    rounded = (value.view(torch.int32) + bits) & ~0xFFFF
    return rounded.view(torch.float32).bfloat16()


def split_fp32(value: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → the nearest bf16 number, ties away from zero, and the rest as int16; `join_fp32` is its inverse."""
    bits = value.view(torch.int32)
    low = bits.to(torch.int16)  # wraps: the lower half, read as a signed number
    return (bits - low).view(torch.float32).bfloat16(), low


def join_fp32(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers that `split_fp32` took apart, to the last bit."""
    return (high.float().view(torch.int32) + low).view(torch.float32)


def random_16bit(seed: int, step: int, index: int, part: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32 uniform in [0, 2¹⁶): a function of (seed, step, index, part, element) alone, on every device."""
    counters = torch.arange(-(-count // BITS_PER_COUNTER), device=device)
    words = [torch.full((), word & WORD, device=device) for word in (index, part, step, seed, seed >> 32)]
    random = philox_4x32((counters, *words[:3]), (words[3], words[4]))
    halves = [half for word in random for half in (word & 0xFFFF, word >> 16)]
    return torch.cat([half.int() for half in halves])[:count]
