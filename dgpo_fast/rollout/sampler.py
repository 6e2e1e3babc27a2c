"""Draws images: a few-step ODE or SDE from noise to latents, then the decoder."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from dgpo_kernels import guided_dpmpp_2m_step, guided_euler_step, philox_normal
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from dgpo_fast.models.family import Guidance, family_of
from dgpo_fast.models.finite import watched
from dgpo_fast.models.forward import batch_slices, predict, predict_pair
from dgpo_fast.models.latents import Pictures, decode_plainly, latent_shape
from dgpo_fast.models.own_settings import image_size
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.prompts import Prompt
from dgpo_fast.rollout.draw import Draw
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
    transformer: ModelMixin,
    noise: Tensor,
    text: TextEmbeds,
    draw: Draw,
    *,
    step_noise: StepNoise | None = None,
    on_step: Callable[[float], None] | None = None,
) -> Tensor:
    """Solves the ODE of one batch from `noise` and returns x0, (B, C, H, W) fp32.

    A trajectory is kept only if asked for.

    Args:
        transformer: predicts the velocities; it should have no adapters.
        noise: (B, C, H, W) fp32 at σ = 1.
        text: the B prompts, one a sample; their negative prompts are read with guidance.
        draw: grid and guidance.
        step_noise: draws the noise of the steps, and keeps them if asked to; for a schedule that has noise.
        on_step: told the share done, in (0, 1], after each solver step.
    """
    schedule, guidance, text = draw.schedule, draw.guidance, text.with_embedded(draw.guidance.embedded)
    if step_noise is not None:
        step_noise.start(noise, schedule.steps)
    x, x0_previous = noise, None
    for step in range(schedule.steps):
        timestep, coefficients = schedule.timesteps[step], schedule.coefficients[step]
        velocities, scale = _velocities(transformer, x, timestep, text, guidance)
        if schedule.solver == "euler":
            moved = guided_euler_step(x, *velocities, guidance_scale=scale, coefficients=coefficients)
            x = moved if step_noise is None else step_noise.add(x, moved, schedule, step)
        else:
            x, x0_previous = guided_dpmpp_2m_step(
                x, *velocities, x0_previous, guidance_scale=scale, coefficients=coefficients
            )
        if on_step:
            on_step((step + 1) / schedule.steps)
    return x


def _velocities(
    transformer: ModelMixin, x: Tensor, timestep: Tensor, text: TextEmbeds, guidance: Guidance
) -> tuple[tuple[Tensor, Tensor | None], float]:
    """What a solver's step gets: a velocity and that of the negative prompt, and the scale by which it combines them.

    It knows the plain rule alone: by another one they are combined here.
    """
    if not guidance.pairs:
        return (predict(transformer, x, timestep, text), None), guidance.scale
    pair = predict_pair(transformer, x, timestep, text)
    if guidance.rule is None:
        return pair, guidance.scale
    return (guidance.combine(*pair), None), 1.0


class Solve(Protocol):
    """`sample_latents`, or a function that computes the same."""

    def __call__(
        self,
        transformer: ModelMixin,
        noise: Tensor,
        text: TextEmbeds,
        draw: Draw,
        *,
        step_noise: StepNoise | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> Tensor:
        """See `sample_latents`."""
        ...


Decode = Callable[[Tensor], Callable[[], Pictures]]
"""Starts decoding (B, C, H, W) latents; the function returned waits for the pictures."""


def plain_decoding(vae: nn.Module, batch_size: int) -> Decode:
    """Decodes when the images are asked for, `batch_size` at a time."""
    return lambda latents: partial(decode_plainly, vae, latents, batch_size)


class Sampler:
    """Draws and decodes images of prompts with one transformer.

    Args:
        pipeline: its decoder is looked at if a picture is not finite.
        transformer: gives the velocities, and its family the shape of latents; its weights may change between calls.
        encoder: the prompt encoder, shared so that a prompt is encoded once.
        resolution: of the images (`config.bounds.Resolution`); None is the model's own.
        solve: solves the ODE.
        decode: how images are decoded.
        decodes_ahead: batches whose images are best asked for later, since `decode` works beside the rollout.

    Raises UserError if the resolution does not fit the model.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        transformer: ModelMixin,
        encoder: PromptEncoder,
        *,
        resolution: int | str | None,
        decode: Decode,
        solve: Solve = sample_latents,
        decodes_ahead: int = 0,
    ):
        self.pipeline = pipeline
        self.transformer = transformer
        self.encoder = encoder
        self.solve = solve
        self.start_decoding = decode
        self.decodes_ahead = decodes_ahead
        self.shape = latent_shape(family_of(transformer), resolution)
        self.image_size = image_size(family_of(transformer), resolution)

    @property
    def device(self) -> torch.device:
        """The transformer's."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's."""
        return self.transformer.dtype

    def latents(
        self,
        text: TextEmbeds,
        samples: Tensor,
        draw: Draw,
        *,
        seed: int,
        number: int,
        step_noise: StepNoise | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> Tensor:
        """x0 (B, C, H, W) fp32 of one batch.

        Args:
            text: the B prompts, at most `draw.batch_size`.
            samples: (B,) int64, their numbers in the rollout, on the transformer's device.
            draw: how.
            seed: of the initial noise's stream.
            number: of the rollout, such as the iteration. The noise is a function of (seed, number, sample) alone.
            step_noise: for a schedule that has noise.
            on_step: told the share done, in (0, 1], after each solver step.
        """
        noise = initial_noise(self.shape, samples, seed=seed, draw=number)
        return self.solve(self.transformer, noise, text, draw, step_noise=step_noise, on_step=on_step)

    def batches(
        self,
        prompts: Sequence[str],
        draw: Draw,
        *,
        first: int,
        seed: int,
        negative: Sequence[str] | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> Iterator[Tensor]:
        """x0 (B, C, H, W) fp32 of one batch after another, without noise in the steps.

        Args:
            prompts: one an image; those of a batch are encoded when it is drawn.
            draw: how.
            first: the number of the first image; the others follow.
            seed: of the initial noise's stream.
            negative: negative prompts, one an image; None: empty ones.
            on_step: told the share of all images that is done, in (0, 1].
        """
        for rows in batch_slices(len(prompts), draw.batch_size):

            def on_batch_step(share: float, rows: slice = rows) -> None:
                if on_step:
                    on_step((rows.start + share * (rows.stop - rows.start)) / len(prompts))

            samples = torch.arange(first + rows.start, first + rows.stop, device=self.device)
            text = self.encoder(prompts[rows], negative and negative[rows])
            yield self.latents(text, samples, draw, seed=seed, number=0, on_step=on_batch_step)

    def first_fault(self, prompt: Prompt, draw: Draw, *, number: int, seed: int) -> str:
        """Draws a picture of `batches` again, and names the layer that is the first to give NaN or infinity.

        Args:
            prompt: its prompt, with its negative prompt.
            draw: how.
            number: its number.
            seed: of the initial noise's stream.

        Returns:
            ", first in the transformer's …" or the decoder's; empty if all is finite this time.
        """
        samples = torch.tensor([number], device=self.device)
        noise = initial_noise(self.shape, samples, seed=seed, draw=0)
        text, vae = self.encoder([prompt.text], [prompt.negative]), self.pipeline.vae
        with watched(transformer=self.transformer, decoder=vae.decoder) as found:
            decode_plainly(vae, sample_latents(self.transformer, noise, text, draw), 1)
        return f", first in {found[0]}" if found else ""

    def decode(self, x0: Tensor) -> Pictures:
        """Latents (B, C, H, W) → pictures."""
        return self.start_decoding(x0)()
