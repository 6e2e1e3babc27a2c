"""Which memory layouts the kernels read as they are, and how their results are laid out.

One layout holds for all tensors of a call: that of the first tensor. The kernels know two: a sample's elements one
after the other, and channels_last with a number of channels divisible by four (Philox's four words are four quarters
of a sample, hence four ranges of channels). The distance between samples is free in both, so that slices and expanded
batches are read in place. A tensor in any other layout is copied into the call's.
"""

import math

import torch
from torch import Tensor


def channels_of(tensor: Tensor) -> int:
    """The call's layout: the number of channels if ``tensor`` is channels_last in a readable way, else 0."""
    if _dense(tensor, range(1, tensor.dim())) or tensor.dim() != 4 or not _dense(tensor, (2, 3, 1)):
        return 0
    return tensor.shape[1] if tensor.shape[1] % 4 == 0 and math.prod(tensor.shape[1:]) < 1 << 31 else 0


def in_layout(tensor: Tensor, channels: int) -> Tensor:
    """``tensor`` itself if a sample of it is laid out as the call's are, else a copy that is."""
    order = (2, 3, 1) if channels else range(1, tensor.dim())
    if _dense(tensor, order):
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if channels else torch.contiguous_format)


def empty_like(tensor: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of ``tensor``'s shape in the call's layout."""
    memory_format = torch.channels_last if channels else torch.contiguous_format
    return torch.empty_like(tensor, dtype=dtype, memory_format=memory_format)


def _dense(tensor: Tensor, order: range | tuple[int, ...]) -> bool:
    """Whether the sample's dimensions, slowest first in ``order``, lie one after the other without gaps."""
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.shape[dim]
    return True
