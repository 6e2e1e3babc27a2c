"""A recorder for any device: a test double of `dgpo_fast.engine.graphs.CudaGraphs`, at least as strict.

It stands for what a CUDA graph demands of the function that it records:

* An operation that would make the host wait for the device, or that brings host data in, fails while it is recorded.
* What the function allocates lies in the recording's own pool, and is kept as long as the recording. Memory from
  outside is read at the addresses that it had, and the recording does not keep it: a replay fails where it has been
  freed since.
* A replay does the recorded operations, each into the memory that it had, and runs nothing of Python.

Two things it does not stand for: the results of a replay's operations pass through new memory, where a graph allocates
nothing at all; and of another device than the recording's it knows nothing.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# `.item()`, branches on a tensor, sizes that depend on data, `torch.tensor(numbers)`.
FORBIDDEN = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "lift_fresh",
    "_pin_memory",
    "repeat_interleave.Tensor",
)


T = TypeVar("T")


class Outside:
    """A tensor in memory that the recording did not allocate, and does not keep."""

    def __init__(self, tensor: Tensor):
        # torch keeps one Python object a storage as long as the storage lives, so it goes when the memory does.
        self.storage = weakref.ref(tensor.untyped_storage())
        self.empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self.layout = (tensor.storage_offset(), tensor.shape, tensor.stride())

    def found(self) -> Tensor:
        """The tensor, at its old address."""
        storage = self.storage()
        assert storage is not None, "memory that the recording reads was freed after it: no graph keeps it"
        return self.empty.new_empty(0).set_(storage, *self.layout)  # type: ignore[call-overload]


class Tape(TorchDispatchMode):
    """The operations of one function, on the very memory that they ran on.

    Attributes:
        pool: storages that the function allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.pool: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN:
            raise AssertionError(f"{func} waits for the device or reads the host's memory: no graph can hold it")
        out = func(*args, **kwargs)
        given, returned = _storages((args, kwargs)), _storages(out)
        self.pool |= {key: storage for key, storage in returned.items() if key not in given}
        self.operations.append((func, *tree_map(self._kept, (args, kwargs, out))))
        return out

    def replay(self) -> None:
        """Does all operations again, each result into the memory that it has."""
        for func, *recorded in self.operations:
            args, kwargs, out = tree_map(_found, recorded)
            again, returns = func(*args, **kwargs), func._schema.returns
            pairs = zip(out, again, strict=True) if len(returns) > 1 else [(out, again)]
            for returned, (old, new) in zip(returns, pairs, strict=True):
                if returned.alias_info is None:  # neither a view nor in place
                    for old_tensor, new_tensor in zip(tree_leaves(old), tree_leaves(new), strict=True):
                        old_tensor.copy_(new_tensor)

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self.pool:
            return value
        return Outside(value)


class TapeRecorder:
    """Records tapes.

    Attributes:
        tapes: one for each function recorded.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """See `dgpo_fast.engine.graphs.Recorder`."""
        function()
        tape = Tape()
        with tape:
            output = function()
        self.tapes.append(tape)
        return output, torch.no_grad()(tape.replay)


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """Those of all tensors in `tree`, by identity."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in storages}


def _found(value: Any) -> Any:
    return value.found() if isinstance(value, Outside) else value
