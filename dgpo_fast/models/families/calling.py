"""Forwards of diffusers' modules that are written out here, because their own cannot be compiled or recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Has a call of `module` be `forward(module, …)` during the block, with its hooks."""
    own = vars(module).get("forward")
    module.forward = partial(forward, module)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def called(transformer: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`forward(transformer, …)` as a call of `transformer`, with its hooks: one of them gathers sharded weights."""
    with forward_of(transformer, forward):
        return transformer(*inputs)
