"""Forwards of diffusers' transformers that are written out here, because their own cannot be compiled or recorded."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn


def called(transformer: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`forward(transformer, …)` as a call of `transformer`, with its hooks: one of them gathers sharded weights."""
    own = vars(transformer).get("forward")
    transformer.forward = partial(forward, transformer)
    try:
        return transformer(*inputs)
    finally:
        del transformer.forward
        if own is not None:
            transformer.forward = own
