"""Draws images: a few-step ODE or SDE from noise to latents, then the decoder."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from dgpo_kernels import guided_dpmpp_2m_step, guided_euler_step, philox_normal
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from dgpo_fast.models.forward import batch_slices, predict, predict_pair
from dgpo_fast.models.latents import decode_plainly, latent_shape
from dgpo_fast.models.prompt_encoder import PromptEncoder, TextEmbeds
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.rollout.step_noise import StepNoise


def initial_noise(shape: tuple[int, ...], samples: Tensor, *, seed: int, draw: int) -> Tensor:
    """Noise at σ = 1. Each sample's noise only depends on (seed, draw, sample).

    Args:
        shape: (C, H, W) of a latent.
        samples: (B,) int64 indices of the samples.

    Returns:
        (B, C, H, W) fp32 on the device of `samples`.
    """
    return philox_normal(shape, samples, seed=seed, draw=draw, device=samples.device, dtype=torch.float32)


@torch.no_grad()
def sample_latents(
    transformer: SD3Transformer2DModel,
    noise: Tensor,
    text: TextEmbeds,
    empty: TextEmbeds,
    schedule: Schedule,
    *,
    guidance_scale: float,
    batch_size: int,
    step_noise: StepNoise | None = None,
    on_step: Callable[[float], None] | None = None,
) -> Tensor:
    """Solves the ODE from `noise` and returns x0, (B, C, H, W) fp32. A trajectory is kept only if asked for.

    Args:
        transformer: predicts the velocities; it should have no adapters.
        noise: (B, C, H, W) fp32 at σ = 1.
        text: the B prompts, one a sample.
        empty: the empty prompt, one row; used if `guidance_scale` > 1.
        schedule: grid and coefficients on the noise's device.
        guidance_scale: v = v_uncond + g·(v_cond − v_uncond); 1 is unguided.
        batch_size: samples per forward.
        step_noise: draws the noise of the steps, and keeps them if asked to; for a schedule that has noise.
        on_step: called after each solver step with the finished share, in (0, 1].
    """
    if step_noise is not None:
        step_noise.start(noise, schedule.steps)
    chunks = []
    for rows in batch_slices(len(noise), batch_size):
        x, x0_previous = noise[rows], None
        for step in range(schedule.steps):
            timestep = schedule.timesteps[step]
            if guidance_scale > 1:
                conditional, unconditional = predict_pair(transformer, x, timestep, text[rows], empty)
            else:
                conditional, unconditional = predict(transformer, x, timestep, text[rows]), None
            velocities, numbers = (conditional, unconditional), schedule.coefficients[step]
            if schedule.solver == "euler":
                moved = guided_euler_step(x, *velocities, guidance_scale=guidance_scale, coefficients=numbers)
                x = moved if step_noise is None else step_noise.add(x, moved, schedule, step, rows)
            else:
                x, x0_previous = guided_dpmpp_2m_step(
                    x, *velocities, x0_previous, guidance_scale=guidance_scale, coefficients=numbers
                )
            if on_step:
                on_step((rows.start + len(x) * (step + 1) / schedule.steps) / len(noise))
        chunks.append(x)
    return torch.cat(chunks)


class Solve(Protocol):
    """`sample_latents`, or a function that computes the same."""

    def __call__(
        self,
        transformer: SD3Transformer2DModel,
        noise: Tensor,
        text: TextEmbeds,
        empty: TextEmbeds,
        schedule: Schedule,
        *,
        guidance_scale: float,
        batch_size: int,
        step_noise: StepNoise | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> Tensor:
        """See `sample_latents`."""
        ...


Decode = Callable[[Tensor], Callable[[], np.ndarray]]
"""Starts decoding (B, C, H, W) latents; the function returned waits for the images, uint8 (B, height, width, 3)."""


class Sampler:
    """Draws and decodes images of prompts with one transformer.

    Args:
        pipeline: gives the text encoders and the decoder.
        transformer: gives the velocities; its weights may change between calls.
        encoder: the prompt encoder, shared so that a prompt is encoded once.
        resolution: pixels, or None for what the transformer was trained at.
        batch_size: samples per forward.
        solve: solves the ODE or SDE.
        decode: decodes latents; by default plainly, when the images are asked for.
        decodes_ahead: number of batches after which to ask for images, if `decode` works during the rollout.

    Raises UserError if the resolution does not fit the model.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        transformer: SD3Transformer2DModel,
        encoder: PromptEncoder,
        *,
        resolution: int | None,
        batch_size: int,
        solve: Solve = sample_latents,
        decode: Decode | None = None,
        decodes_ahead: int = 0,
    ):
        self.pipeline = pipeline
        self.transformer = transformer
        self.encoder = encoder
        self.batch_size = batch_size
        self.solve = solve
        self.start_decoding: Decode = decode or (lambda x0: partial(decode_plainly, pipeline.vae, x0, batch_size))
        self.decodes_ahead = decodes_ahead
        self.shape = latent_shape(transformer, pipeline.vae, resolution)

    def latents(
        self,
        prompts: Sequence[str],
        samples: Tensor,
        schedule: Schedule,
        *,
        guidance_scale: float,
        seed: int,
        draw: int,
        step_noise: StepNoise | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> tuple[Tensor, TextEmbeds]:
        """x0 (B, C, H, W) fp32 for B prompts, and their embeddings.

        `samples` (B,) int64 keys the initial noise; `step_noise` is for a schedule that has noise.
        """
        text = self.encoder(prompts)
        noise = initial_noise(self.shape, samples, seed=seed, draw=draw)
        x0 = self.solve(
            self.transformer,
            noise,
            text,
            self.encoder([""]),
            schedule,
            guidance_scale=guidance_scale,
            batch_size=self.batch_size,
            step_noise=step_noise,
            on_step=on_step,
        )
        return x0, text

    def keep_up(self, mine: int, most: int, prompt: str, schedule: Schedule, guidance_scale: float) -> None:
        """Makes extra forwards, whose images are not used, so that their number is that of `most` samples, not `mine`.

        With sharded weights, all processes must make the same number of forwards.
        """
        for rows in batch_slices(mine, self.batch_size, most):
            if rows.start == rows.stop:
                nobody = torch.zeros(1, dtype=torch.int64, device=next(self.transformer.parameters()).device)
                self.latents([prompt], nobody, schedule, guidance_scale=guidance_scale, seed=0, draw=0)

    def decode(self, x0: Tensor) -> np.ndarray:
        """Latents → uint8 images (B, height, width, 3)."""
        return self.start_decoding(x0)()
