"""The names that trainers give to the factors of a LoRA, and the layers that they mean.

diffusers, PEFT, SimpleTuner and AI-toolkit name layers as diffusers does. Others take a model's original names, which
its family knows (`Family.lora_names`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

PREFIXES = {
    "transformer": (
        "transformer.",
        "diffusion_model.",
        "model.diffusion_model.",
        "lora_transformer.",
        "lora_transformer_",
        "lora_unet_",
        "lycoris_",
        "",
    ),
    "text_encoder": ("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.", "lora_te1.", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.", "lora_te2.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "text_encoders.t5xxl.transformer.", "t5.", "lora_te3.", "lora_te3_"),
}
"""What stands in front of a layer's name, by the part of the pipeline that has the layer."""
OTHER_ADAPTERS = {
    "dora_scale": "a DoRA",
    "magnitude_vector": "a DoRA",
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_": "an OFT",
    "lora_mid": "a LoCon with Tucker factors",
}
"""What stands in the names of adapters that are not W + B·A."""
_FACTOR = re.compile(r"(.+?)\.lora(?:_linear_layer)?[_.](A|B|down|up)(?:(?:\.\w+)?\.weight)?")
_KINDS = {"down": "A", "up": "B"}


class Target(NamedTuple):
    """Where a named layer is in diffusers' model.

    Attributes:
        layers: one, or those that share its output in this order: query, key and value.
        swapped: whether the two halves of its output, shift and scale, are the other way round there.
    """

    layers: tuple[str, ...]
    swapped: bool = False


def split_name(name: str) -> tuple[str, str] | None:
    """The layer's name and "A", "B" or "alpha", of a tensor's name in a file; None if it is nothing of a LoRA's."""
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    found = _FACTOR.fullmatch(name)
    return found and (found[1], _KINDS.get(found[2], found[2]))


def candidates(name: str) -> Iterator[tuple[str, str]]:
    """The parts of a pipeline that a layer's name in a file may belong to, each with the name in that part."""
    name = name.removeprefix("base_model.model.")
    for part, prefixes in PREFIXES.items():
        yield from ((part, name.removeprefix(prefix)) for prefix in prefixes if name.startswith(prefix))


def is_of_text_encoder(name: str) -> bool:
    """Whether a layer's name in a file has a text encoder's prefix."""
    return any(part != "transformer" for part, _ in candidates(name))


def targets(model: nn.Module, originals: Mapping[str, Target]) -> dict[str, Target]:
    """The layers of a transformer or text encoder by every name that files may give them, without prefixes.

    Args:
        model: says which layers there are.
        originals: layers by other names than diffusers'.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    found = {name: Target((name,)) for name in layers}
    found |= {name: target for name, target in originals.items() if layers.issuperset(target.layers)}
    return found | {name.replace(".", "_"): target for name, target in found.items()}
