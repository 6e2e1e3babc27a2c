"""Functions of tensors whose shapes never change: recorded once, replayed with new contents."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Recorder(Protocol):
    """Records what a function does to the device, so that it can be done again without running the function."""

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """What `function` returns, and what computes it again, into the same memory, from the same inputs."""
        ...


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory. They must be replayed on one stream.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """See `Recorder.record`. The function runs once before it is recorded, to compile what there is to compile."""
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Rewards on the GPU allocate in threads of their own: only what this thread does must fit into a graph.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = function()
        return output, graph.replay


class Recording:
    """A recorded function of named tensors with the batch in front, to tensors with the batch in front.

    Args:
        function: gets static tensors of `inputs`' shapes and dtypes; reads nothing else that changes, but weights in
            place, and waits for nothing.
        inputs: examples of a whole batch.
        recorder: of the device.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
        inputs: Mapping[str, Tensor],
        recorder: Recorder,
    ):
        self.inputs = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        self.outputs, self.replay = recorder.record(lambda: function(self.inputs))

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The function of `inputs`, which may be fewer rows than a whole batch. Valid until the next call."""
        rows = max(len(tensor) for tensor in inputs.values())
        for name, tensor in inputs.items():
            self.inputs[name][: len(tensor)].copy_(tensor)
        self.replay()
        return tuple(output[:rows] for output in self.outputs)
