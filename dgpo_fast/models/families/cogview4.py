"""CogView4: GLM-4-9B's second last state is its text, one sequence with the image in every block.

A prompt stands behind padding up to a multiple of 16 tokens, which the transformer reads as text; in a batch, a mask
hides what is added behind. The transformer is told the size of the picture, and positions are stretched over it. It
reads the time before the shift, in whole thousandths.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import CogView4Pipeline, CogView4Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from transformers import GlmConfig

from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.families import autoencoder_kl
from dgpo_fast.models.families.autoencoder_kl import KLLatents
from dgpo_fast.models.families.packing import shift_of_mu
from dgpo_fast.models.families.padding import padded_with_mask
from dgpo_fast.models.family import AttentionShape, Grid, Rows, alike_between, random_tokens, rounded_up

COGVIEW4_6B = "THUDM/CogView4-6B"
SCHEDULER: Mapping[str, Any] = {"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}
"""What the pipeline takes if its scheduler does not say."""


def _published() -> Architecture:
    """CogView4-6B, 6.37 B weights, as diffusers' convert_cogview4_to_diffusers_megatron.py builds it. The text encoder
    has the defaults of transformers' class, which are GLM-4-9B's."""
    return Architecture(
        index={
            "_class_name": "CogView4Pipeline",
            "text_encoder": ["transformers", "GlmModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        },
        transformer={"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},
        vae={
            **autoencoder_kl.PUBLISHED,
            "block_out_channels": (128, 512, 1024, 1024),
            "layers_per_block": 3,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 1.0,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        },
        text_encoders={"text_encoder": GlmConfig()},
        scheduler=flow_match_scheduler(1.0, use_dynamic_shifting=True, time_shift_type="linear", **SCHEDULER),
        name=COGVIEW4_6B,
    )


class CogView4(KLLatents):
    """CogView4."""

    title = "CogView4"
    text_parts = ("text_encoder", "tokenizer")
    block_names = ("transformer_blocks",)
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
    text_length = 1024
    pads_to = 16
    attention_names = ("native",)  # its processor does not go through diffusers' dispatcher
    known_models: ClassVar = {COGVIEW4_6B: _published}
    pipeline_class = CogView4Pipeline
    transformer_class = CogView4Transformer2DModel

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.largest_side = self.architecture.transformer["pos_embed_max_size"] * self.multiple

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        return alike_between(self.architecture.transformer, "num_layers")

    # Latents and pictures

    def shift(self, latent: tuple[int, ...]) -> float:
        """The model's own, for a (C, H, W) latent."""
        scheduler = {**SCHEDULER, **self.architecture.scheduler}
        if not scheduler.get("use_dynamic_shifting"):
            return self.architecture.shift
        share = self.image_tokens(latent) / scheduler["base_image_seq_len"]
        return shift_of_mu(scheduler, share**0.5 * scheduler["max_shift"] + scheduler["base_shift"])

    def grid(self, steps: int, latent: tuple[int, ...]) -> Grid:
        thousandths = torch.linspace(1000, 1, steps, dtype=torch.float64).trunc()
        return Grid(self.shift(latent), tuple((thousandths / 1000).tolist()))

    # Prompts

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        device = pipeline.transformer.device
        rows, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, device=device, max_sequence_length=length
        )
        return {"text": rows[0]}

    def random_condition(self, text: str, length: int) -> Rows:
        width = self.architecture.transformer["text_embed_dim"]
        return {"text": random_tokens(text, rounded_up(length, self.pads_to), width)}

    def stack(self, rows: Sequence[Rows], tokens: int) -> Rows:
        return padded_with_mask(rows, tokens)

    # Forwards

    def velocity(
        self, transformer: Any, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        text, latent = condition["text"], tuple(x_t.shape[1:])
        attend_masked(transformer)
        height, width = (torch.full_like(timestep, side * self.pixels) for side in latent[1:])
        size = torch.stack([height, width], dim=1)
        with x_t.device:  # else its positions are the CPU's, and each block waits for a copy of them
            positions = transformer.rope(x_t)
        return transformer(
            hidden_states=x_t.to(text.dtype),
            encoder_hidden_states=text,
            timestep=self.before_shift(timestep, latent),
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            attention_mask=F.pad(condition["mask"], (0, self.image_tokens(latent)), value=True)[:, None, None],
            image_rotary_emb=positions,
            return_dict=False,
        )[0]

    def before_shift(self, timestep: Tensor, latent: tuple[int, ...]) -> Tensor:
        """The time of which the model's own shift makes `timestep`: the inverse of k·σ / (1 + (k − 1)·σ), in whole
        thousandths, which its pipeline's are."""
        sigma, shift = timestep / 1000, self.shift(latent)
        return (1000 * sigma / (shift - (shift - 1) * sigma)).round()

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        calls = self.architecture.transformer["num_layers"]
        return (self.joint_attention(batch, latent, text_tokens, calls=calls, text=text_tokens),)


class MaskedAttention:
    """CogView4's attention of text and image tokens. The mask of diffusers' processor is added to the scores, and hides
    nothing."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(B, N, C) image and (B, T, C) text tokens → the same; the mask is (B, 1, 1, T + N), true where a key is
        read; positions are the image's cosines and sines, (N, head_dim) each."""
        texts = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            layer(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            _turned(norm(heads).to(value.dtype), texts, image_rotary_emb)
            for norm, heads in ((attn.norm_q, query), (attn.norm_k, key))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = attn.to_out[0](attended.transpose(1, 2).flatten(2))  # to_out[1] is a dropout, which is at 0
        return out[:, texts:], out[:, :texts]


def attend_masked(transformer: Any) -> None:
    """Gives all blocks a `MaskedAttention`, unless they have one."""
    attentions = [block.attn1 for block in transformer.transformer_blocks]
    if not isinstance(attentions[0].processor, MaskedAttention):
        processor = MaskedAttention()
        for attention in attentions:
            attention.set_processor(processor)


def _turned(heads: Tensor, texts: int, positions: tuple[Tensor, Tensor]) -> Tensor:
    """(B, H, T + N, D) with the image's tokens turned by their positions; text has none."""
    image = apply_rotary_emb(heads[:, :, texts:], positions, use_real_unbind_dim=-2)
    return torch.cat([heads[:, :, :texts], image], dim=2)
