"""FLUX.1 for the tests of every family: dev, and schnell."""

from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from tests.families.case import Case, fill
from tests.families.tiny_parts import autoencoder, clip, clip_tokenizer, drawn_packed, quiet, t5, t5_tokenizer

LENGTH = 96


def make(is_dev: bool) -> FluxPipeline:
    """A pipeline of 3 joint and 3 single blocks."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=is_dev,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        # Pictures of 24 tokens get a shift of their own.
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if is_dev else 1.0, use_dynamic_shifting=is_dev, base_image_seq_len=16, max_image_seq_len=64
        ),
        vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(24),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
        transformer=fill(transformer),
    )
    return quiet(pipeline)


def draw(
    pipeline: FluxPipeline, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`Case.pipeline_draws`."""
    options = {"guidance_scale": scale, "num_inference_steps": steps, "max_sequence_length": LENGTH}
    return drawn_packed(pipeline, noise, prompt=prompt, **options)


CASE = Case(
    name="flux1",
    make=partial(make, is_dev=True),
    family="dgpo_fast.models.families.flux1:Flux1",
    pipeline_draws=draw,
    size=(16, 24),
    scales={"guided": 3.5, "guided less": 1.0},
    length=LENGTH,
)


def draw_against(
    pipeline: FluxPipeline, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`Case.pipeline_draws` with a negative prompt."""
    options = {"num_inference_steps": steps, "max_sequence_length": LENGTH, "negative_prompt": negative}
    return drawn_packed(pipeline, noise, prompt=prompt, true_cfg_scale=scale, **options)


GUIDED = Case(
    name="flux1-guided",
    make=partial(make, is_dev=True),
    family="dgpo_fast.models.families.flux1:GuidedFlux1",
    pipeline_draws=draw_against,
    size=(16, 24),
    length=LENGTH,
)
SCHNELL = Case(
    name="flux1-schnell",
    make=partial(make, is_dev=False),
    family="dgpo_fast.models.families.flux1:Flux1",
    pipeline_draws=draw,
    size=(16, 24),
    scales={"unguided": 1.0},
    length=LENGTH,
)
