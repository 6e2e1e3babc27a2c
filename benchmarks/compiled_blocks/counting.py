"""From a function of tensors to the kernels that Inductor would launch for it, counted before anything is compiled.

A function is traced on fake tensors (forward and backward, with the compiler's own passes over the joint graph), its
graphs are moved to a GPU that `pretended` describes, and Inductor schedules them and writes their code. It is stopped
there: the scheduler's nodes are the launches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.compiled_blocks.pretended import other_version, pretended, replaced

try:
    import torch._functorch.aot_autograd as aot
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, tracing
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import fuse_attention, joint_graph, post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
except ImportError as error:
    raise other_version(error) from None

GPU = torch.device("cuda:0")


@dataclass(frozen=True)
class Launches:
    """What one run of compiled code launches.

    Attributes:
        fused: kernels that Inductor writes itself.
        fused_bytes: read and written by them.
        library: calls of libraries: matrix products, attention, convolutions.
        library_bytes: inputs and outputs of these.
    """

    fused: int
    fused_bytes: int
    library: int
    library_bytes: int


@dataclass(frozen=True)
class Counted:
    """Both directions of a function; `backward` is None without a gradient."""

    forward: Launches
    backward: Launches | None = None


class _StopError(Exception):
    """The code is written; nothing of it is compiled."""


def count(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], mode: FakeTensorMode, gpu: SimpleNamespace
) -> Counted:
    """Launches of `function`, which is differentiated if one of `inputs` requires it.

    Args:
        function: of the tensors alone.
        inputs: fake CPU tensors of `mode`. Shapes, strides and dtypes are those of the GPU's.
        mode: of the inputs.
        gpu: properties of the one that the code is for.
    """
    graphs: dict[str, tuple[fx.GraphModule, Sequence[Tensor]]] = {}

    def keep(name: str) -> Callable:
        def compiler(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Callable:
            graphs[name] = (graph, examples)
            return aot.make_boxed_func(graph.forward)

        return compiler

    def cut(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint_graph.joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, joint_inputs, compiler="inductor", **kwargs)

    trained = any(tensor.requires_grad for tensor in inputs)
    with mode, torch.set_grad_enabled(trained), _as_on_a_gpu():
        outputs = aot.aot_function(
            function,
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            inference_compiler=keep("forward"),
            partition_fn=cut,
            decompositions=select_decomp_table(),
        )(*inputs)
        if trained:
            torch.autograd.backward(tuple(outputs), tuple(torch.empty_like(output) for output in outputs))
        else:
            joint_graph.joint_graph_passes(graphs["forward"][0])
        return Counted(**{name: _scheduled(graph, examples, mode, gpu) for name, (graph, examples) in graphs.items()})


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Convolutions have cuDNN's layout, and no pass runs functions on the device to look for attention in a graph."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    with (
        replaced(fuse_attention, _sfdp_init=nothing),
        replaced(joint_graph, lazy_init=nothing),
        replaced(post_grad, reinplace_inplaceable_ops=nothing),
        replaced(torch._C, _conv_determine_backend_memory_format=_cudnn_format),
    ):
        yield


def _cudnn_format(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """Of a convolution's output: channels_last if an argument is."""
    for tensor in (x, weight):
        if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def _scheduled(
    graph: fx.GraphModule, examples: Sequence[Tensor], mode: FakeTensorMode, gpu: SimpleNamespace
) -> Launches:
    """Moves a graph to the GPU and has Inductor schedule it."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    graph.recompile()
    moved = [torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device=GPU) for e in examples]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    found: list[Launches] = []

    def stop(lowering: GraphLowering) -> None:
        lowering.codegen()
        found.append(_launches(lowering.scheduler.nodes))
        raise _StopError

    uncached = inductor_config.patch(compile_threads=1, fx_graph_cache=False, fx_graph_remote_cache=False)
    with pretended(gpu), uncached, tracing(TracingContext(mode)), replaced(GraphLowering, compile_to_module=stop):
        try:
            compile_fx_inner(graph, moved)
        except Exception as error:
            if not found or not _comes_of(error, _StopError):
                raise
    return found[0]


def _launches(nodes: Sequence[BaseSchedulerNode]) -> Launches:
    fused, library = [], []
    for node in nodes:
        if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
            continue  # names of memory
        nbytes = node.get_read_write_buffers_sizes()
        (library if node.is_extern() or node.is_template() else fused).append(nbytes)
    return Launches(len(fused), sum(fused), len(library), sum(library))


def _comes_of(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether `error` was raised because of one of `kind`."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or getattr(error, "inner_exception", None) or error.__context__
    return error is not None
