"""Frozen linear layers whose weights are kept in 4 or 8 bits, through bitsandbytes: QLoRA.

A weight is widened to the run's precision where it is used, and forgotten again; a backward pass widens it anew.
Activations are not rounded, so a quantised model computes what one with the widened weights does, to the last bit. A
copy with merged weights, or a LoRA's, therefore belongs to the same model.

* **int8**: 255 evenly spaced numbers, times the largest of 256 weights: 8.13 bits a weight.
* **nf4**: 16 numbers, times the largest of 64 weights; these scales are kept in 8 bits too: 4.13 bits a weight.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from dgpo_fast.errors import UserError
from dgpo_fast.models.family import family_of

SAME = "same"
NF4_BLOCK, BYTE_BLOCK = 64, 256
"""Numbers that share a scale, in 4 and in 8 bits."""
TABLE = "table"
"""The numbers that 8 bits stand for, one tensor for all layers."""
BUFFERS = {"int8": (TABLE, "codes", "scales"), "nf4": (TABLE, "codes", "scale_codes", "scale_scales", "scale_mean")}


class QuantisedLinear(nn.Linear):
    """A frozen linear layer. Reading its `weight` widens it.

    Args:
        layer: stays as it is.
        precision: "int8" or "nf4".
        device: where the layer goes.
    """

    def __init__(self, layer: nn.Linear, precision: str, device: torch.device | str):
        nn.Module.__init__(self)  # that of a linear layer makes a weight
        self.in_features, self.out_features, self.precision = layer.in_features, layer.out_features, precision
        self.dtype = layer.weight.dtype
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        packed = _pack(layer.weight.detach().to(device), precision)
        for name, tensor in zip(BUFFERS[precision], packed, strict=True):
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in) in the run's precision, in new memory."""
        return _widen(self._packed, self._shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return _Linear.apply(x.to(self.dtype), self.bias, self._shape, *self._packed)

    @property
    def packed_bytes(self) -> int:
        """What takes the weight's place."""
        return sum(tensor.nbytes for name, tensor in self.named_buffers() if name != TABLE)

    @property
    def _packed(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in BUFFERS[self.precision])

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


@torch.library.custom_op("dgpo_fast::times_widened", mutates_args=())
def _times_widened(gradient: Tensor, packed: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """(…, out) · W → (…, in). One operator, for a compiler would widen once and save the weight for the backward."""
    return gradient @ _widen(packed, shape, gradient.dtype)


@_times_widened.register_fake
def _(gradient: Tensor, packed: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], shape[1]))


@register_flop_formula(torch.ops.dgpo_fast.times_widened)
def _flops(gradient: torch.Size, packed: Sequence[torch.Size], shape: Sequence[int], **unused: object) -> int:
    return 2 * gradient.numel() * shape[1]


# PyTorch types nothing of the backward pass's ctx.
class _Linear(torch.autograd.Function):
    """x·Wᵀ + b, which saves the packed weight alone for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *packed: Tensor) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*packed)
        return F.linear(x, _widen(packed, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors
        dx = _times_widened(gradient, packed, ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, *(None for _ in packed)


def quantise(module: nn.Module, precision: str, device: torch.device | str, names: Sequence[str] = ("",)) -> None:
    """Quantises the linear layers of `module` in place, one after another; all else stays where it is.

    Args:
        module: frozen.
        precision: "int8" or "nf4".
        device: where the quantised layers go, so that the whole model never has to fit there.
        names: starts of the names of the layers that are meant.

    Raises UserError if bitsandbytes is not installed.
    """
    _require_bitsandbytes(precision)
    for name, layer in [*linear_layers(module, names)]:
        _exchange(module, name, QuantisedLinear(layer, precision, device))


def quantise_blocks(transformer: ModelMixin, precision: str, device: torch.device | str) -> None:
    """As `quantise`, of the linear layers in the transformer's blocks: they hold nearly all of its weights."""
    quantise(transformer, precision, device, block_starts(transformer))


def quantise_base(pipeline: DiffusionPipeline, precision: str, device: torch.device) -> None:
    """Quantises the transformer of `pipeline`, which is on the CPU, and moves all of it to `device`; nothing if
    `precision` is "same"."""
    if precision != SAME:
        quantise_blocks(pipeline.transformer, precision, device)
        pipeline.to(device)


def block_starts(transformer: nn.Module) -> tuple[str, ...]:
    """The starts of the names of all that is inside of blocks."""
    return tuple(f"{blocks}." for blocks in family_of(transformer).block_names)


def linear_layers(module: nn.Module, names: Sequence[str] = ("",)) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of `module` whose names start with one of `names`, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith(tuple(names)):
            yield name, layer


def quantised_layers(module: nn.Module) -> list[QuantisedLinear]:
    """The layers of `module` that are quantised."""
    return [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]


def numel(module: nn.Module) -> int:
    """Weights of `module`, quantised or not."""
    rest = sum(parameter.numel() for parameter in module.parameters())
    return rest + sum(layer.in_features * layer.out_features for layer in quantised_layers(module))


def widen(module: nn.Module) -> None:
    """Makes the quantised layers of `module` plain ones with the widened weights, in place."""
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, QuantisedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
            _exchange(module, name, plain)


def packed_bytes(layer: nn.Linear, precision: str) -> int:
    """What the weight of `layer`, on the meta device, takes when it is quantised."""
    _require_bitsandbytes(precision)
    return QuantisedLinear(layer, precision, "meta").packed_bytes


def _exchange(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def _pack(weight: Tensor, precision: str) -> tuple[Tensor, ...]:
    """In the order of `BUFFERS`."""
    operators, table = torch.ops.bitsandbytes, _table(precision, weight.device)
    if precision == "int8":
        return table, *operators.quantize_blockwise(weight, table, BYTE_BLOCK)
    codes, scales = operators.quantize_4bit(weight, NF4_BLOCK, "nf4", torch.uint8)
    mean = scales.mean()
    return table, codes, *operators.quantize_blockwise(scales - mean, table, BYTE_BLOCK), mean


def _widen(packed: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    operators, (table, codes, *rest) = torch.ops.bitsandbytes, packed
    if len(rest) == 1:
        return operators.dequantize_blockwise(codes, rest[0], table, BYTE_BLOCK, dtype)
    scale_codes, scale_scales, mean = rest
    scales = operators.dequantize_blockwise(scale_codes, scale_scales, table, BYTE_BLOCK, torch.float32) + mean
    return operators.dequantize_4bit(codes, scales, NF4_BLOCK, "nf4", shape, dtype)


@cache
def _table(precision: str, device: torch.device) -> Tensor:
    """The 256 numbers of an 8-bit code: even ones for weights, dynamic ones for scales, as QLoRA has them."""
    from bitsandbytes.functional import create_dynamic_map, create_linear_map

    return (create_linear_map() if precision == "int8" else create_dynamic_map()).to(device)


def _require_bitsandbytes(precision: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(f"weights in {precision} need the package bitsandbytes: pip install bitsandbytes") from None
