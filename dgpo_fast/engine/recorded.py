"""Rollouts as one recorded program for each kind: guided forwards and solver steps of all timesteps."""

from collections.abc import Callable, Mapping

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from dgpo_fast.engine.graphs import Recorder, Recording
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.prompt_encoder import TextEmbeds
from dgpo_fast.rollout.sampler import sample_latents
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.rollout.step_noise import StepNoise

OF_ALL_SAMPLES = ("empty_prompt", "empty_pooled", "draw")
"""Inputs with one row, whatever the batch."""


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
        """See `sample_latents`; `on_step` is told after each batch."""
        if step_noise is not None:
            step_noise.start(noise, schedule.steps)
        x0 = torch.empty_like(noise)
        for rows in batch_slices(len(noise), batch_size):
            inputs = {"noise": noise[rows], "prompt": text.prompt[rows], "pooled": text.pooled[rows]}
            inputs |= {"empty_prompt": empty.prompt, "empty_pooled": empty.pooled}
            if step_noise is not None:
                inputs["samples"] = step_noise.samples[rows]
                inputs["draw"] = torch.full((1,), int(step_noise.draw), device=noise.device)
            recording = self._recording(transformer, inputs, schedule, guidance_scale, batch_size, step_noise)
            x0[rows], *kept = recording(inputs)
            if step_noise is not None and kept:
                step_noise.take(rows, *kept)
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
        step_noise: StepNoise | None,
    ) -> Recording:
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in inputs.values())
        seed, keep = (step_noise.seed, step_noise.keep) if step_noise else (0, False)
        key = (id(transformer), id(schedule), guidance_scale, batch_size, seed, keep, shapes)
        if key not in self.recordings:
            whole = {name: _repeat_last(x, batch_size) for name, x in inputs.items() if name not in OF_ALL_SAMPLES}
            recording = Recording(
                lambda static: _solve(transformer, static, schedule, guidance_scale, seed, keep),
                {**inputs, **whole},
                self.recorder,
            )
            self.recordings[key] = recording, transformer, schedule
        return self.recordings[key][0]


def _solve(
    transformer: SD3Transformer2DModel,
    static: Mapping[str, Tensor],
    schedule: Schedule,
    guidance_scale: float,
    seed: int,
    keep: bool,
) -> tuple[Tensor, ...]:
    """x0; and the steps, with the batch in front, if they are kept."""
    step_noise = None
    if "samples" in static:
        step_noise = StepNoise(static["samples"], seed=seed, draw=static["draw"][0], keep=keep)
    x0 = sample_latents(
        transformer,
        static["noise"],
        TextEmbeds(static["prompt"], static["pooled"]),
        TextEmbeds(static["empty_prompt"], static["empty_pooled"]),
        schedule,
        guidance_scale=guidance_scale,
        batch_size=len(static["noise"]),
        step_noise=step_noise,
    )
    kept = step_noise.transitions if step_noise else None
    return (x0,) if kept is None else (x0, kept.states.transpose(0, 1), kept.log_prob.T)


def _repeat_last(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` filled up to `rows` with its last row."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
