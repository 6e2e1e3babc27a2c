"""Chroma for the tests of every family: with the mask of diffusers' pipeline, and with one that hides padding."""

from typing import Any
from unittest.mock import patch

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.families.case import Case, fill
from tests.families.tiny_parts import autoencoder, drawn_packed, quiet, t5, t5_tokenizer

LENGTH = 96


def make() -> ChromaPipeline:
    """A pipeline of 3 joint and 3 single blocks."""
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )
    fill(transformer)
    # Modulations that depend less on the time: the last bit of a step's σ would show in the picture.
    transformer.distilled_guidance_layer.out_proj.weight.mul_(0.1)
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64
        ),
        vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5(32),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    return quiet(pipeline)


def draw(
    pipeline: ChromaPipeline, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`Case.pipeline_draws`."""
    options = {"guidance_scale": scale, "num_inference_steps": steps, "max_sequence_length": LENGTH}
    return drawn_packed(pipeline, noise, prompt=prompt, negative_prompt=negative, **options)


def draw_masked(
    pipeline: ChromaPipeline, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`draw` of a pipeline whose mask hides what it should."""
    shipped = pipeline._prepare_attention_mask

    def prepare(**given: Any) -> Tensor | None:
        mask = shipped(**given)
        return None if mask is None else mask.bool()

    with patch.object(pipeline, "_prepare_attention_mask", prepare):
        return draw(pipeline, noise, prompt, negative, scale, steps)


CASE = Case(
    name="chroma",
    make=make,
    family="dgpo_fast.models.families.chroma:Chroma",
    pipeline_draws=draw,
    size=(16, 24),
    length=LENGTH,
)
MASKED = Case(
    name="chroma-masked",
    make=make,
    family="dgpo_fast.models.families.chroma:MaskedChroma",
    pipeline_draws=draw_masked,
    size=(16, 24),
    length=LENGTH,
)
