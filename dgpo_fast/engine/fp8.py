"""Rollouts in float8: an inexact option. Other images are drawn, and learnt from; the gradient's arithmetic stays.

Activations and weights of the blocks' linear layers are scaled row by row to float8 (torchao's dynamic rowwise
quantisation). Everything else is the behaviour copy's own.
"""

import copy
from itertools import chain

import torch
from diffusers import ModelMixin
from peft.tuners.lora import LoraLayer
from torch import nn

from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Family, family_of

SMALLEST_CAPABILITY = (8, 9)
REMEDY = "use --engine.rollout-precision same"


class Float8Copy:
    """A transformer whose blocks multiply in float8, with the weights of another one.

    Args:
        source: the behaviour copy. All tensors that are not quantised are shared with it.

    Raises UserError if torchao is missing or the GPU has no float8.
    """

    def __init__(self, source: ModelMixin):
        check_float8(source.device)
        if any(isinstance(module, LoraLayer) for module in source.modules()):
            raise UserError(f"engine.rollout_precision fp8: needs --policy.behaviour merged, or {REMEDY}")
        family = family_of(source)
        shared = {id(tensor): tensor for tensor in chain(source.parameters(), source.buffers())}
        self.transformer = copy.deepcopy(source, shared)
        self.layers = [
            (module, self.transformer.get_submodule(name))
            for name, module in source.named_modules()
            if isinstance(module, nn.Linear) and quantised(family, name, module)
        ]
        for layer, copied in self.layers:
            copied.weight = _quantise(layer)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the source's weights over, in place."""
        for layer, copied in self.layers:
            copied.weight.copy_(_quantise(layer))


def quantised(family: Family, name: str, layer: nn.Linear) -> bool:
    """Whether float8 pays for a layer: those of the blocks that see every token, in sizes that the hardware takes.

    The modulations' layers see one row a sample, and steer all tokens.
    """
    in_block = name.startswith(tuple(f"{blocks}." for blocks in family.block_names)) and ".norm" not in name
    return in_block and layer.in_features % 16 == 0 and layer.out_features % 16 == 0


def check_float8(device: torch.device) -> None:
    """Raises UserError if float8 rollouts are not available."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < SMALLEST_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(f"engine.rollout_precision fp8: {name} has no float8; {REMEDY}")
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise UserError(
            f"engine.rollout_precision fp8: torchao is not installed: pip install torchao, or {REMEDY}"
        ) from None


def _quantise(layer: nn.Linear) -> nn.Parameter:
    """The layer's weight as torchao has it, in new memory."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    holder = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    holder.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    quantize_(holder, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return holder.weight
