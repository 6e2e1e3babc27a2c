"""AuraFlow for the tests of every family."""

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.families.case import Case, fill
from tests.families.tiny_parts import FACTOR, autoencoder, drawn, quiet, t5, t5_tokenizer

LENGTH = 96


def make() -> AuraFlowPipeline:
    """A pipeline of 3 joint and 3 single blocks, for pictures of up to 32 pixels."""
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=3,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    pipeline = AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(32, multilingual=True),
        vae=autoencoder(4, scaling_factor=0.13025),
        transformer=fill(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    return quiet(pipeline)


def draw(
    pipeline: AuraFlowPipeline, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """`Case.pipeline_draws`."""
    height, width = (FACTOR * side for side in noise.shape[-2:])
    return drawn(
        pipeline,
        noise,
        prompt=prompt,
        negative_prompt=negative,
        guidance_scale=scale,
        num_inference_steps=steps,
        height=height,
        width=width,
        max_sequence_length=LENGTH,
    )


CASE = Case(
    name="auraflow",
    make=make,
    family="dgpo_fast.models.families.auraflow:AuraFlow",
    pipeline_draws=draw,
    size=(16, 24),
    length=LENGTH,
)
