"""fp32 linear layers of a CPU run by oneDNN.

PyTorch gives fp32 products on x86 to MKL, which leaves half of the vector width of some processors unused; oneDNN,
which PyTorch has for convolutions and bf16, does not. The result differs in rounding alone.
"""

from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from dgpo_fast.engine.timing import Spread, best_ms

FASTER_BY = 1.2
"""A product that is a tenth faster alone has made a whole iteration slower, and processors where oneDNN pays make it
twice as fast."""
TIMED_S = 0.1
_LIBRARY = torch.library.Library("dgpo_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor", tags=_TAGS)
_LIBRARY.define("linear_input_gradient(Tensor gradient, Tensor weight) -> Tensor", tags=_TAGS)
_LIBRARY.define("linear_weight_gradient(Tensor gradient, Tensor x) -> Tensor", tags=_TAGS)


@torch.library.impl(_LIBRARY, "linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    approximation = "tanh" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], approximation)


@torch.library.impl(_LIBRARY, "linear_input_gradient", "CPU")
def _linear_input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")


@torch.library.impl(_LIBRARY, "linear_weight_gradient", "CPU")
def _linear_weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    columns, rows = gradient.flatten(0, -2).t(), x.flatten(0, -2).t()
    return torch.ops.mkldnn._linear_pointwise(columns, rows, None, "none", [], "")


@torch.library.register_fake("dgpo_fast::linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("dgpo_fast::linear_input_gradient", lib=_LIBRARY)
def _(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


@torch.library.register_fake("dgpo_fast::linear_weight_gradient", lib=_LIBRARY)
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.new_empty((gradient.shape[-1], x.shape[-1]))


# PyTorch types nothing of the backward pass's ctx.
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.dgpo_fast.linear(x, weight, bias, "none")

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.ops.dgpo_fast.linear_input_gradient(gradient, weight) if needs_x else None,
            torch.ops.dgpo_fast.linear_weight_gradient(gradient, x) if needs_weight else None,
            gradient.flatten(0, -2).sum(0) if needs_bias else None,
        )


class OneDNNLinear(nn.Linear):
    """`nn.Linear` of fp32 tensors on a CPU, computed by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if torch.is_grad_enabled():
            return _Linear.apply(x, self.weight, self.bias)
        return torch.ops.dgpo_fast.linear(x, self.weight, self.bias, "none")


class OneDNNGELU(GELU):
    """Linear layer and tanh-approximated GELU; one call of oneDNN if no gradient is wanted."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if torch.is_grad_enabled():
            return F.gelu(self.proj(hidden_states), approximate=self.approximate)
        return torch.ops.dgpo_fast.linear(hidden_states, self.proj.weight, self.proj.bias, "gelu")


def use_onednn(module: nn.Module, on: bool = True) -> None:
    """Makes all linear layers of `module` oneDNN's, or PyTorch's own again; weights and names stay."""
    ours: dict[type, type] = {nn.Linear: OneDNNLinear, GELU: OneDNNGELU}
    classes = ours if on else {mine: theirs for theirs, mine in ours.items()}
    for child in module.modules():
        if type(child) in classes and _fits(child):
            child.__class__ = classes[type(child)]


def _fits(module: nn.Module) -> bool:
    """Whether a layer is what its class says alone: an adapter around a GELU's projection has to be called."""
    return not isinstance(module, GELU) or (module.approximate == "tanh" and isinstance(module.proj, nn.Linear))


def available() -> bool:
    """Whether this build of PyTorch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def time_linear(rows: int, width: int, spread: Spread | None = None) -> tuple[float, float]:
    """Milliseconds of PyTorch's and of oneDNN's product (rows, width) × (width, 4·width) on this CPU."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(4 * width, width, generator=generator)
    calls = (lambda: F.linear(x, weight), lambda: torch.ops.dgpo_fast.linear(x, weight, None, "none"))
    with torch.no_grad():
        torch_ms, onednn_ms = best_ms(calls, torch.device("cpu"), TIMED_S, spread)
    return torch_ms, onednn_ms
