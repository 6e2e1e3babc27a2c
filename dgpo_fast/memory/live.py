"""Bytes of live tensors, counted from the operations that create them, on any device, also the meta device.

Not counted: workspaces inside operations, the allocator's rounding, and anything that is not a tensor.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages made under it, until nothing holds them any more.

    Args:
        existing: tensors that are there already and count from the beginning.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once so far.
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref] = {}
        for tensor in existing:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # torch keeps one Python object a storage as long as the storage lives, so it goes when the memory does.
        self.known[key] = weakref.ref(storage, partial(self._drop, key, storage.nbytes()))

    def _drop(self, key: int, nbytes: int, gone: weakref.ref) -> None:
        del self.known[key]
        self.now -= nbytes
