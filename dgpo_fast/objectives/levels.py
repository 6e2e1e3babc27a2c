"""Noise levels, and predictions of frozen weights at several of them, in full batches (`engine.batch_timesteps`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from dgpo_kernels import group_noise
from torch import Tensor

from dgpo_fast.config.options import Rollout
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.seeds import stream_seed

Forward = Callable[[Tensor, Tensor, TextEmbeds], Mapping[str, Tensor]]
"""(x_t, timestep, text) of R rows → predictions by name, each with R rows."""


@dataclass(frozen=True)
class Inputs:
    """What a transformer reads at one noise level.

    Attributes:
        x_t: (R, C, H, W) noisy latents.
        timestep: () or (R,), in [0, 1000].
        text: the R prompts.
    """

    x_t: Tensor
    timestep: Tensor
    text: TextEmbeds

    def __len__(self) -> int:
        return len(self.x_t)

    def __getitem__(self, rows: slice) -> "Inputs":
        """Some of the rows."""
        return Inputs(self.x_t[rows], self.timestep.expand(len(self))[rows], self.text[rows])


@dataclass(frozen=True)
class Level:
    """A noise level.

    Attributes:
        sigma, timestep: () or (B,) each; () if it is shared.
        draw: the number of its noise.
        shared: whether a group's samples share one row of a forward (`objectives/first_level.py`).
    """

    sigma: Tensor
    timestep: Tensor
    draw: int
    shared: bool = False

    def inputs(self, batch: Batch, seed: Tensor, draw: Tensor) -> Inputs:
        """What the transformers read of `batch` at this level; `seed` and `draw` are the noise's, on its device."""
        if self.shared:
            batch = batch.group_means()
        x_t = group_noise(batch.x0, self.sigma, batch.group_index, seed=seed, draw=draw)
        return Inputs(x_t, self.timestep, batch.text)


def draw_training_steps(iteration: int, *, count: int, among: int, seed: int) -> list[int]:
    """`count` different step indices out of the first `among` of the rollout's grid, the noisiest ones."""
    rng = np.random.default_rng([stream_seed(seed, "timesteps"), iteration])
    return [int(step) for step in rng.choice(among, size=count, replace=False)]


def training_sigmas(schedule: Schedule, choice: str) -> Tensor:
    """σ of the training latents at each of the grid's S steps by `dgpo.training_sigma`; at least S values, fp32."""
    return schedule.timesteps / 1000 if choice == "timestep" else schedule.sigmas


def frozen_batch(rollout: Rollout, *, pairs: bool) -> int:
    """Samples in a forward of frozen weights: with as many rows as a rollout's forward if that is more.

    Args:
        rollout: its settings, with guidance in plain numbers (`models/own_settings.py`).
        pairs: whether a sample has two rows, for guidance.
    """
    rows = rollout.batch_size * Guidance(rollout.guidance_scale).forwards
    return max(rollout.batch_size, rows // (2 if pairs else 1))


@torch.no_grad()
def predict_levels(forward: Forward, levels: Sequence[Inputs], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Predictions of `forward` at one noise level after another, without gradients.

    A batch goes on from one level into the next, so that only the last one is not full. Predictions are made as they
    are asked for: those of a level and of a batch are all that is held.

    Args:
        forward: gets at most `batch_size` rows.
        levels: at least one row each; their prompts are rows of the same embeddings.
        batch_size: rows per forward.
    """
    batches = batch_slices(sum(map(len, levels)), batch_size)
    ready: dict[str, list[Tensor]] = {}
    done, needed = 0, 0
    for level in levels:
        needed += len(level)
        while done < needed:
            rows = next(batches)
            some, done = _joined(levels, rows), rows.stop
            for name, predicted in forward(some.x_t, some.timestep, some.text).items():
                ready.setdefault(name, []).append(predicted)
        joined = {name: torch.cat(parts) for name, parts in ready.items()}
        ready = {name: [tensor[len(level) :]] for name, tensor in joined.items()}
        yield {name: tensor[: len(level)] for name, tensor in joined.items()}


def _joined(levels: Sequence[Inputs], rows: slice) -> Inputs:
    """Rows of `levels` laid end to end."""
    pieces, start = [], 0
    for level in levels:
        pieces.append(level[max(rows.start - start, 0) : max(rows.stop - start, 0)])
        start += len(level)
    text = TextEmbeds.joined([piece.text for piece in pieces])
    return Inputs(torch.cat([piece.x_t for piece in pieces]), torch.cat([piece.timestep for piece in pieces]), text)
