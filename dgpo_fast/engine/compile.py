"""Regional compilation: each kind of transformer block once, for the few batch sizes that a run has."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dgpo_fast.models.family import family_of
from dgpo_fast.models.forward import Forward, Given, call_around

# Kinds of blocks (3) × batch sizes × with and without gradients × with and without adapters; several runs in a process.
RECOMPILE_LIMIT = 256
BACKEND = "inductor"
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, AttributeError)
"""The compiler refuses in many ways, and so do kernels of shapes and dtypes that they have not."""


def obstacle() -> str:
    """Why nothing can be compiled on this CPU, in a few words; empty if a small function can.

    A compiler may be installed without the headers or the linker that it needs.
    """
    try:
        torch.compile(torch.square, backend=BACKEND, dynamic=False)(torch.ones(8))
    except REFUSALS as error:
        return f"the compiler fails: {reason(error)}"
    return ""


def reason(error: Exception) -> str:
    """What went wrong, in one line, without the line in which Dynamo names the backend."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 and lines[0].endswith("raised:") else lines[0]


def compile_blocks(transformer: nn.Module, batches: "StaticBatches") -> None:
    """Compiles the blocks of `transformer`, each as a whole graph that all blocks of its kind share.

    Its forwards are padded to `batches` from now on.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * RECOMPILE_LIMIT)
    for block in family_of(transformer).blocks(transformer):
        block.compile(fullgraph=True, dynamic=False, backend=BACKEND)
    batches.attach(transformer)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if any(parameter.grad_dtype != parameter.dtype for parameter in trained):
        HiddenGradients(trained).attach(transformer)


class StaticBatches:
    """Pads a partial last batch to a size that is compiled already, and cuts its output: nothing is compiled twice.

    Args:
        sizes: of whole batches in forwards without a gradient. A larger batch stays as it is.
        training: the same for forwards with one.
    """

    def __init__(self, sizes: Iterable[int], training: Iterable[int] = ()):
        self.sizes, self.training = sorted(set(sizes)), sorted(set(training))

    def padded(self, rows: int) -> int:
        """Rows of the forward that serves `rows` samples."""
        sizes = self.training if torch.is_grad_enabled() else self.sizes
        return next((size for size in sizes if size >= rows), rows)

    def attach(self, transformer: nn.Module) -> None:
        """Pads every forward of `transformer`."""
        call_around(transformer, self._padded, innermost=True)

    def _padded(self, forward: Forward, given: Given) -> Tensor:
        missing = self.padded(len(given)) - len(given)
        if not missing:
            return forward(given)
        return forward(given.mapped(lambda rows: _repeat_last(rows, missing)))[: len(given)]


class HiddenGradients:
    """Takes gradients off their parameters during a forward.

    Dynamo refuses to trace a bf16 parameter that has an fp32 gradient, though no forward reads it.

    Args:
        parameters: of the module.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self._gradients: list[Tensor | None] = []

    def attach(self, module: nn.Module) -> None:
        """Hides them in every forward of `module`."""
        module.register_forward_pre_hook(self._hide)
        module.register_forward_hook(self._show, always_call=True)

    def _hide(self, module: nn.Module, args: tuple) -> None:
        self._gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

    def _show(self, module: nn.Module, args: tuple, output: object) -> None:
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._gradients = []


def _repeat_last(rows: Tensor, times: int) -> Tensor:
    """`rows` with the last one `times` times more: finite numbers, whose output is cut off and has no gradient."""
    return torch.cat([rows, rows[-1:].expand(times, *rows.shape[1:])])
