"""LoRA layers that compute with merged weights: one product, and a gradient of the factors alone.

With W' = W + s·B·A, s = alpha / rank, an adapted layer is y = x·W'ᵀ + b. Its gradients are those of the layer and its
adapter apart, which PEFT adds up from three products:

    dx = dy·W'        dA = (dy·sB)ᵀ·x        dB = dyᵀ·(x·sAᵀ)

W' is rounded to the run's dtype. In bf16, a ΔW = s·B·A below half a unit in the last place of W is lost in the forward.
The factors are not rounded, so ΔW grows out of this range in the first steps. `merge` says how much is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


class _MergedLinear(torch.autograd.Function):
    """x (…, in) times merged (out, in), for the gradients of the factors (r, in) and (out, r)."""

    @staticmethod
    def forward(
        x: Tensor, merged: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaled_down: Tensor, scaled_up: Tensor
    ) -> Tensor:
        return F.linear(x, merged, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, merged, _, _, _, scaled_down, scaled_up = inputs
        ctx.save_for_backward(x, merged, scaled_down, scaled_up)

    # PyTorch types nothing of the backward pass's ctx.
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, scaled_down, scaled_up = ctx.saved_tensors
        rows, dy = x.flatten(0, -2), gradient.flatten(0, -2)
        dx = (dy @ merged).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, (dy @ scaled_up).t() @ rows, dy.t() @ (rows @ scaled_down.t()), None, None


class MergedLoraLinear(LoraLinear):
    """PEFT's layer with the same weights and names, computing with the merged weight.

    `merge` has to be called after every change of the factors.
    """

    merged_weight: Tensor
    scaled_down: Tensor
    scaled_up: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in the dtype of the merged weight."""
        down, up = factors(self)
        return _MergedLinear.apply(
            x.to(self.merged_weight.dtype),
            self.merged_weight,
            self.base_layer.bias,
            down,
            up,
            self.scaled_down,
            self.scaled_up,
        )

    def hold(self) -> None:
        """Makes the buffers, which are no part of the layer's state."""
        down, up = factors(self)
        weight = self.base_layer.weight
        for name, shape in (("merged_weight", weight.shape), ("scaled_down", down.shape), ("scaled_up", up.shape)):
            self.register_buffer(name, torch.empty(shape, dtype=weight.dtype, device=weight.device), persistent=False)

    @torch.no_grad()
    def merge(self) -> tuple[Tensor, Tensor] | None:
        """Merges the factors as they are now, in place.

        Returns ⟨W' − W, ΔW⟩ and ⟨ΔW, ΔW⟩ if W' is rounded: their ratio is the share of ΔW that is kept.
        """
        down, up = factors(self)
        exact = merged_weight(self, down, up)
        self.merged_weight.copy_(exact)
        scale = _scale(self)
        self.scaled_down.copy_(down * scale)
        self.scaled_up.copy_(up * scale)
        if self.merged_weight.dtype == exact.dtype:
            return None
        base = self.base_layer.weight.to(exact.dtype)
        update = scale * (up.to(exact.dtype) @ down.to(exact.dtype))
        return ((self.merged_weight.to(exact.dtype) - base) * update).sum(), update.square().sum()


def use_merged_weights(module: nn.Module) -> Sequence[MergedLoraLinear]:
    """Has all LoRA layers of `module` compute with merged weights, which are not merged yet; returns them."""
    for child in module.modules():
        if type(child) is LoraLinear:
            child.__class__ = MergedLoraLinear
    layers = [child for child in module.modules() if isinstance(child, MergedLoraLinear)]
    for layer in layers:
        layer.hold()
    return layers


def merge_all(layers: Sequence[MergedLoraLinear]) -> Tensor | None:
    """Merges all of `layers`; the share of their ΔW that rounding keeps, a scalar on their device; None if all is."""
    sums = [found for layer in layers if (found := layer.merge()) is not None]
    if not sums:
        return None
    kept, whole = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    return torch.where(whole > 0, kept / whole, 1.0)


def factors(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of the layer's only adapter."""
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def merged_weight(layer: LoraLinear, down: Tensor, up: Tensor) -> Tensor:
    """W + s·B·A (out, in) in fp32, or in fp64 if the layer is.

    Args:
        layer: has W and s.
        down, up: A (r, in) and B (out, r), in any float dtype, on any device.
    """
    weight = layer.base_layer.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    down, up = (factor.to(weight.device, wide) for factor in (down, up))
    return torch.addmm(weight.to(wide), up, down, alpha=_scale(layer))


def _scale(layer: LoraLinear) -> float:
    (scale,) = layer.scaling.values()
    return scale
