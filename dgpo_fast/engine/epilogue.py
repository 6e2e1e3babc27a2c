"""GELU in the epilogue of the matrix product before it, in forwards without a gradient.

A compiled block writes the product of its feed-forward's first layer, reads it again and writes its GELU. A GPU's
library (cuBLASLt) applies the GELU before it writes anything. A forward with a gradient needs the product itself.
"""

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("dgpo_fast", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# An operator of our own: the compiler would take aten's apart, into a product and a GELU (of another formula on a CPU).
_LIBRARY.define("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor", tags=_TAGS)


@torch.library.impl(_LIBRARY, "linear_gelu", "CPU")
def _on_a_cpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@torch.library.impl(_LIBRARY, "linear_gelu", "CUDA")
def _on_a_gpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], -1)


@torch.library.register_fake("dgpo_fast::linear_gelu", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_flop_formula(torch.ops.dgpo_fast.linear_gelu)
def _flops(x: torch.Size, weight: torch.Size, *unused: object, **shapes: object) -> int:
    return 2 * x.numel() * weight[0]


class EpilogueGELU(GELU):
    """Linear layer and tanh-approximated GELU; one call if no gradient is wanted."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if torch.is_grad_enabled():
            return super().forward(hidden_states)
        return torch.ops.dgpo_fast.linear_gelu(hidden_states, self.proj.weight, self.proj.bias)


def use_epilogue(module: nn.Module, on: bool = True) -> None:
    """Gives feed-forwards of `module` the fused layer, or diffusers' own again; weights and names stay.

    A layer with an adapter, without a bias or with another GELU stays as it is, and so does oneDNN's, which is one
    call already.
    """
    wanted = EpilogueGELU if on else GELU
    for child in module.modules():
        if type(child) in (GELU, EpilogueGELU) and _fits(child):
            child.__class__ = wanted


def _fits(layer: GELU) -> bool:
    return layer.approximate == "tanh" and isinstance(layer.proj, nn.Linear) and layer.proj.bias is not None
