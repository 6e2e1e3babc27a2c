"""Rollouts as one recorded program for each kind: guided forwards and solver steps of all timesteps."""

from collections.abc import Callable, Mapping

import torch
from diffusers import ModelMixin
from torch import Tensor

from dgpo_fast.engine.graphs import Recorder, Recording
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import sample_latents
from dgpo_fast.rollout.step_noise import StepNoise, Transitions

PROMPT = "prompt."
"""Stands before the names of a prompt's tensors."""
OF_ALL_SAMPLES = ("number",)
"""Inputs with one row, whatever the batch."""


class RecordedRollouts:
    """`sample_latents` without the host: each batch is one replay. A partial batch is padded.

    Weights may change in place between calls; they are read where they are.

    Args:
        recorder: of the device.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.recordings: dict[tuple, Recording] = {}  # what a recording reads is kept as a part of its key

    @torch.no_grad()
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
        """See `sample_latents`; `on_step` is told after the last step."""
        # (B, 1, …); with guidance (B, 2, …), the prompt and its negative prompt.
        rows = text.gathered_pairs() if draw.guided else text.gathered()
        prompts = {name: tensor.unflatten(0, (-1, len(text))).transpose(0, 1) for name, tensor in rows.items()}
        inputs = {"noise": noise, **{f"{PROMPT}{name}": tensor for name, tensor in prompts.items()}}
        if step_noise is not None:
            inputs |= {"samples": step_noise.samples}
            inputs |= {"number": torch.full((1,), int(step_noise.draw), device=noise.device)}
        recorded = self._recording(transformer, inputs, draw, step_noise)(inputs)
        x0, *kept = (output.clone() for output in recorded)  # the next replay overwrites them
        if step_noise is not None and kept:
            states, log_prob = kept
            step_noise.transitions = Transitions(states.transpose(0, 1), log_prob.T)
        if on_step:
            on_step(1.0)
        return x0

    def _recording(
        self, transformer: ModelMixin, inputs: Mapping[str, Tensor], draw: Draw, step_noise: StepNoise | None
    ) -> Recording:
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in inputs.values())
        seed, keep = (step_noise.seed, step_noise.keep) if step_noise else (0, False)
        key = (transformer, draw, seed, keep, shapes)
        if key not in self.recordings:
            whole = {name: _repeat_last(x, draw.batch_size) for name, x in inputs.items() if name not in OF_ALL_SAMPLES}
            self.recordings[key] = Recording(
                lambda static: _solve(transformer, static, draw, seed, keep), {**inputs, **whole}, self.recorder
            )
        return self.recordings[key]


def _solve(
    transformer: ModelMixin, static: Mapping[str, Tensor], draw: Draw, seed: int, keep: bool
) -> tuple[Tensor, ...]:
    """x0; and the steps, with the batch in front, if they are kept."""
    step_noise = None
    if "samples" in static:
        step_noise = StepNoise(static["samples"], seed=seed, draw=static["number"][0], keep=keep)
    prompts = {name.removeprefix(PROMPT): rows for name, rows in static.items() if name.startswith(PROMPT)}
    batch, each = next(iter(prompts.values())).shape[:2]
    index = torch.arange(batch * each, device=static["noise"].device).reshape(batch, each)
    each_prompt, *negative = index.unbind(1)
    text = TextEmbeds(
        {name: rows.flatten(0, 1) for name, rows in prompts.items()}, each_prompt, negative[0] if negative else None
    )
    x0 = sample_latents(transformer, static["noise"], text, draw, step_noise=step_noise)
    kept = step_noise.transitions if step_noise else None
    return (x0,) if kept is None else (x0, kept.states.transpose(0, 1), kept.log_prob.T)


def _repeat_last(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` filled up to `rows` with its last row."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
