"""The `hpsv2` reward: HPSv2.1 (Wu et al. 2023), a CLIP ViT-H/14 tuned to people's preferences.

The published file is in open_clip's format. Its weights are renamed for transformers' CLIP, which is the same network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.shipped import models
from dgpo_fast.rewards.shipped.clip import VIT_H_14, Clip, CosineReward

if TYPE_CHECKING:
    from transformers import CLIPConfig

PUBLISHED = models.Published("xswu/HPSv2/HPS_v2.1_compressed.pt", VIT_H_14)
_VISION_HEAD_WIDTH, _TEXT_HEAD_WIDTH = 80, 64  # of ViT-H-14; the weights show all other sizes

_RENAMED = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    # transformers' own spelling of "layernorm".
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
# open_clip multiplies by these from the right.
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class HpsReward(CosineReward):
    """HPSv2.1: the cosine itself, about 0.2 to 0.35.

    Pictures that are not square are padded with black, as the model was trained.
    """

    def __init__(
        self, weights: str | Path = PUBLISHED.source, tokenizer: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ) -> None:
        """
        Args:
            weights: `HPS_v2.1_compressed.pt` on the hub (2 GB), or a local file.
            tokenizer: hub name or folder of any CLIP's tokenizer.

        Raises:
            UserError: one of the two is not available, or the file is another model's.
        """
        from transformers import AutoTokenizer, CLIPModel

        loaded = models.load_weights("hpsv2", weights, lambda: models.hub_file(weights))
        try:
            config = _config(loaded)
            PUBLISHED.require("hpsv2", weights, config)
            network = CLIPModel(config)
            renamed = rename(loaded)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"reward 'hpsv2': {weights} is no ViT-H-14 of open_clip: {error}: wrong file?") from error
        models.fill("hpsv2", weights, network, renamed)
        reader = models.load_pretrained("hpsv2", AutoTokenizer.from_pretrained, tokenizer)
        super().__init__("hpsv2", Clip(network, reader, square=models.pad_square), 1.0, (0.05, 0.5))


def rename(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's weights of a CLIP with a ViT under transformers' names.

    Raises:
        KeyError: a weight that such a model does not have.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        block = _BLOCK.fullmatch(key.replace("attn.in_proj_", "attn.in_proj."))
        if block is not None:
            tower = "vision_model" if block[1] else "text_model"
            renamed |= _renamed_layer(f"{tower}.encoder.layers.{block[2]}.", block[3], block[4], value)
        elif key in _TRANSPOSED:
            renamed[_TRANSPOSED[key]] = value.T
        else:
            renamed[_RENAMED[key]] = value
    return renamed


def _renamed_layer(prefix: str, layer: str, kind: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if layer != "attn.in_proj":
        return {f"{prefix}{_LAYERS[layer]}.{kind}": value}
    # One matrix makes queries, keys and values.
    return {f"{prefix}self_attn.{part}_proj.{kind}": third for part, third in zip("qkv", value.chunk(3), strict=True)}


def _config(weights: Mapping[str, torch.Tensor]) -> CLIPConfig:
    """transformers' configuration of the network that `weights` are of."""
    from transformers import CLIPConfig

    vision_width, _, patch_size, _ = weights["visual.conv1.weight"].shape
    vocabulary, text_width = weights["token_embedding.weight"].shape
    side = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
    return CLIPConfig(
        projection_dim=weights["text_projection"].shape[1],
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": len(weights["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": _depth(weights, "visual.transformer"),
            "num_attention_heads": vision_width // _VISION_HEAD_WIDTH,
            "patch_size": patch_size,
            "image_size": side * patch_size,
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": _depth(weights, "transformer"),
            "num_attention_heads": text_width // _TEXT_HEAD_WIDTH,
            "max_position_embeddings": len(weights["positional_embedding"]),
            "vocab_size": vocabulary,
            "hidden_act": "gelu",
            # The text's feature is at its end token, which is the last of the vocabulary.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )


def _depth(weights: Mapping[str, torch.Tensor], tower: str) -> int:
    return sum(key.startswith(f"{tower}.resblocks.") and key.endswith(".ln_1.weight") for key in weights)
