"""The device that rewards with a model load it onto. Imports no torch: most rewards need none."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_CHOSEN: ContextVar[Any] = ContextVar("reward device", default=None)


@contextmanager
def on_device(device: Any) -> Iterator[None]:
    """Inside, rewards load their models onto the `torch.device` given; None leaves the choice to them."""
    token = _CHOSEN.set(device)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen_device() -> Any:
    """What the innermost `on_device` was given; None outside."""
    return _CHOSEN.get()
