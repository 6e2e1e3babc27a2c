"""The device that rewards with a model load it onto. Imports no torch: most rewards need none."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CHOSEN: "ContextVar[torch.device | None]" = ContextVar("reward device", default=None)


@contextmanager
def on_device(device: "torch.device | None") -> Iterator[None]:
    """In the block, rewards load their models onto this `torch.device`; None leaves the choice to them."""
    token = _CHOSEN.set(device)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen_device() -> "torch.device | None":
    """What the innermost `on_device` was given; None outside."""
    return _CHOSEN.get()
