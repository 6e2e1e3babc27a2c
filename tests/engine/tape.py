"""A recorder for any device, which is stricter than CUDA graphs: a test double of `dgpo_fast.engine.graphs.CudaGraphs`.

While it records, an operation that would make the host wait for the device, or that brings host data in, fails, as it
does in a CUDA graph's capture. A replay runs the recorded operations on the recorded tensors and nothing of Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# `.item()`, branches on a tensor, sizes that depend on data, `torch.tensor(numbers)`.
FORBIDDEN = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "lift_fresh", "_pin_memory", "repeat_interleave.Tensor",
)  # fmt: skip


class Tape(TorchDispatchMode):
    """The operations of one function, on the very tensors that they ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN:
            raise AssertionError(f"{func} waits for the device or reads the host's memory: no graph can hold it")
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        """Does all operations again, each result into the memory that it has."""
        for func, args, kwargs, out in self.operations:
            again, returns = func(*args, **kwargs), func._schema.returns
            pairs = zip(out, again, strict=True) if len(returns) > 1 else [(out, again)]
            for returned, (old, new) in zip(returns, pairs, strict=True):
                if returned.alias_info is None:  # neither a view nor in place
                    for old_tensor, new_tensor in zip(tree_leaves(old), tree_leaves(new), strict=True):
                        old_tensor.copy_(new_tensor)


class TapeRecorder:
    """Records tapes.

    Attributes:
        tapes: one for each function recorded.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """See `dgpo_fast.engine.graphs.Recorder`."""
        function()
        tape = Tape()
        with tape:
            output = function()
        self.tapes.append(tape)
        return output, torch.no_grad()(tape.replay)
