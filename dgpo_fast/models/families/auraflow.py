"""AuraFlow: joint blocks, then many blocks of one sequence; four latent channels, learned positions.

Text is padded to one length with zeros, which no mask hides, and stands behind eight learned tokens. The table of
positions limits a picture's sides.
"""

from math import isqrt
from typing import Any

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from torch import Tensor, nn
from transformers import UMT5Config

from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.families import autoencoder_kl
from dgpo_fast.models.families.autoencoder_kl import KLLatents
from dgpo_fast.models.families.flux1 import one_of_each
from dgpo_fast.models.families.sd3 import ATTENTION_LAYERS
from dgpo_fast.models.family import AttentionShape, Rows, random_tokens

AURAFLOW_V03 = "fal/AuraFlow-v0.3"
REGISTER_TOKENS = 8
DEFAULT_SIDE = 1024
"""Of the pipeline's default picture, in pixels."""
T5_STD = 0.2
"""Of the text encoder's embeddings, as T5's."""


class AuraFlow(KLLatents):
    """AuraFlow."""

    title = "AuraFlow"
    text_parts = ("text_encoder", "tokenizer")
    block_names = ("joint_transformer_blocks", "single_transformer_blocks")
    lora_targets = ATTENTION_LAYERS
    comfyui = True
    text_length = 256
    attention_names = ("native",)  # its processor does not go through diffusers' dispatcher
    pipeline_class = AuraFlowPipeline
    transformer_class = AuraFlowTransformer2DModel

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.largest_side = isqrt(self.architecture.transformer["pos_embed_max_size"]) * self.multiple

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        return one_of_each(self.architecture.transformer, "num_mmdit_layers", "num_single_dit_layers")

    @property
    def size(self) -> tuple[int, int]:
        # The pipeline's default: it does not read `sample_size`.
        side = min(DEFAULT_SIDE, self.largest_side or DEFAULT_SIDE)
        return side, side

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        prompt, *_ = pipeline.encode_prompt(
            prompt=text,
            device=pipeline.transformer.device,
            max_sequence_length=length,
            do_classifier_free_guidance=False,
        )
        return {"prompt": prompt[0]}

    def random_condition(self, text: str, length: int) -> Rows:
        width = self.architecture.transformer["joint_attention_dim"]
        return {"prompt": random_tokens(text, length, width, T5_STD)}

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        prompt = condition["prompt"]
        return transformer(
            hidden_states=x_t.to(prompt.dtype),
            timestep=timestep / 1000,
            encoder_hidden_states=prompt,
            return_dict=False,
        )[0]

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        config, text = self.architecture.transformer, text_tokens + REGISTER_TOKENS
        # In single blocks, text and image are one sequence already.
        return (
            self.joint_attention(batch, latent, text, calls=config["num_mmdit_layers"], text=text),
            self.joint_attention(batch, latent, text, calls=config["num_single_dit_layers"]),
        )


def auraflow_v03() -> Architecture:
    """AuraFlow-v0.3, of 6.86 B weights.

    The transformer is diffusers' class with its defaults, which convert_aura_flow_to_diffusers.py builds, but for the
    table of positions, which ports of v0.3 have larger. The shift is ComfyUI's (`supported_models.py`). The autoencoder
    is that of Stable Diffusion XL.
    """
    parts = {"text_encoder": "UMT5EncoderModel", "tokenizer": "LlamaTokenizerFast"}
    return Architecture(
        index={"_class_name": "AuraFlowPipeline", **{part: ["transformers", kind] for part, kind in parts.items()}},
        transformer={"pos_embed_max_size": 9216},
        vae={**autoencoder_kl.PUBLISHED, "latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025},
        text_encoders={"text_encoder": pile_t5_xl()},
        scheduler=flow_match_scheduler(1.73),
        name=AURAFLOW_V03,
    )


def pile_t5_xl() -> UMT5Config:
    """Pile-T5-XL, whose encoder has 1.22 B weights."""
    return UMT5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"
    )


AuraFlow.known_models = {AURAFLOW_V03: auraflow_v03}
