"""The names that trainers give to the factors of a LoRA, and the layers of Stable Diffusion 3 that they mean.

diffusers, PEFT, SimpleTuner and AI-toolkit name layers as diffusers does. kohya's scripts, ComfyUI and OneTrainer take
the original names of SD3, where query, key and value are one layer; OneTrainer numbers the three.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from diffusers import SD3Transformer2DModel
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
BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
"""Original names in `joint_blocks.N`: diffusers' in `transformer_blocks.N`."""
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
"""Original names outside of the blocks: diffusers'."""
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


def targets(model: nn.Module) -> dict[str, Target]:
    """The layers of a transformer or text encoder by every name that files may give them, without prefixes."""
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    found = {name: Target((name,)) for name in layers}
    if isinstance(model, SD3Transformer2DModel):
        originals = dict(_original_names(len(model.transformer_blocks)))
        found |= {name: target for name, target in originals.items() if layers.issuperset(target.layers)}
    return found | {name.replace(".", "_"): target for name, target in found.items()}


def _original_names(blocks: int) -> Iterator[tuple[str, Target]]:
    for name, layer in OUTSIDE.items():
        yield name, Target((layer,), swapped=layer == "norm_out.linear")
    for block in range(blocks):
        for name, layers in BLOCK.items():
            # The last block has no other use of the text, and modulates it as the final layer does the image.
            swapped = block == blocks - 1 and layers == ("norm1_context.linear",)
            whole = tuple(f"transformer_blocks.{block}.{layer}" for layer in layers)
            yield f"joint_blocks.{block}.{name}", Target(whole, swapped)
            if len(whole) > 1:
                yield from ((f"joint_blocks.{block}.{name}.{n}", Target((layer,))) for n, layer in enumerate(whole))
