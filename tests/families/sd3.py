"""Stable Diffusion 3's case: the small random pipeline of the other tests, with every parameter random."""

import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from tests.families.case import Case, fill
from tests.pipelines import save_random_pipeline

LENGTH = 9


def make() -> StableDiffusion3Pipeline:
    with tempfile.TemporaryDirectory() as folder:
        save_random_pipeline(Path(folder))
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for seed, module in enumerate((pipeline.transformer, pipeline.vae)):
        fill(module, seed)
    return pipeline


def pipeline_draws(
    pipeline: StableDiffusion3Pipeline, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    latents = pipeline(
        prompt,
        negative_prompt=negative,
        latents=noise,
        height=noise.shape[2] * pipeline.vae_scale_factor,
        width=noise.shape[3] * pipeline.vae_scale_factor,
        guidance_scale=scale,
        num_inference_steps=steps,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images
    config = pipeline.vae.config
    with torch.no_grad():
        return latents, pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample


CASE = Case(
    name="sd3",
    make=make,
    family="dgpo_fast.models.families.sd3:SD3",
    pipeline_draws=pipeline_draws,
    size=(16, 24),
    length=LENGTH,
)
