"""Rollouts as one recorded program for each kind: guided forwards and solver steps of all timesteps."""

from collections.abc import Callable, Mapping

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from dgpo_fast.engine.graphs import Recorder, Recording
from dgpo_fast.rollout import batch_slices, sample_latents
from dgpo_fast.schedule import Schedule
from dgpo_fast.stochastic import StepNoise
from dgpo_fast.text import TextEmbeds


class RecordedRollouts:
    """`sample_latents` without the host: each batch is one replay. A last partial batch is padded.

    Weights may change in place between calls; they are read where they are.

    Args:
        recorder: of the device.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        # What a recording reads is kept beside it; their ids are its key.
        self.recordings: dict[tuple, tuple[Recording, SD3Transformer2DModel, Schedule]] = {}

    @torch.no_grad()
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
        """See `sample_latents`, which draws the rollouts with noise; `on_step` is told after each batch."""
        if step_noise is not None:
            return sample_latents(
                transformer, noise, text, empty, schedule,
                guidance_scale=guidance_scale, batch_size=batch_size, step_noise=step_noise, on_step=on_step,
            )  # fmt: skip
        x0 = torch.empty_like(noise)
        for rows in batch_slices(len(noise), batch_size):
            inputs = {"noise": noise[rows], "prompt": text.prompt[rows], "pooled": text.pooled[rows]}
            inputs |= {"empty_prompt": empty.prompt, "empty_pooled": empty.pooled}
            x0[rows] = self._recording(transformer, inputs, schedule, guidance_scale, batch_size)(inputs)
            if on_step:
                on_step(rows.stop / len(noise))
        return x0

    def _recording(
        self,
        transformer: SD3Transformer2DModel,
        inputs: Mapping[str, Tensor],
        schedule: Schedule,
        guidance_scale: float,
        batch_size: int,
    ) -> Recording:
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in inputs.values())
        key = (id(transformer), id(schedule), guidance_scale, batch_size, shapes)
        if key not in self.recordings:
            whole = {name: _repeat_last(tensor, batch_size) for name, tensor in inputs.items() if "empty" not in name}
            recording = Recording(
                lambda static: _solve(transformer, static, schedule, guidance_scale),
                {**inputs, **whole},
                self.recorder,
            )
            self.recordings[key] = recording, transformer, schedule
        return self.recordings[key][0]


def _solve(
    transformer: SD3Transformer2DModel, static: Mapping[str, Tensor], schedule: Schedule, guidance_scale: float
) -> Tensor:
    return sample_latents(
        transformer,
        static["noise"],
        TextEmbeds(static["prompt"], static["pooled"]),
        TextEmbeds(static["empty_prompt"], static["empty_pooled"]),
        schedule,
        guidance_scale=guidance_scale,
        batch_size=len(static["noise"]),
    )


def _repeat_last(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` filled up to `rows` with its last row."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
