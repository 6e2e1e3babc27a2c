"""Predictions of frozen weights at several noise levels, in full batches (`engine.batch_timesteps`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.seeds import stream_seed

Forward = Callable[[Tensor, Tensor, TextEmbeds], Mapping[str, Tensor]]
"""(x_t, timestep, text) of R samples → predictions by name, each with R rows."""


def draw_training_steps(iteration: int, *, count: int, among: int, seed: int) -> list[int]:
    """`count` different step indices out of the first `among` of the rollout's grid, the noisiest ones."""
    rng = np.random.default_rng([stream_seed(seed, "timesteps"), iteration])
    return [int(step) for step in rng.choice(among, size=count, replace=False)]


@torch.no_grad()
def predict_levels(
    forward: Forward, x_t: Sequence[Tensor], timesteps: Sequence[Tensor], text: TextEmbeds, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Predictions of `forward` for the same B samples at one noise level after another, without gradients.

    A batch goes on from one level into the next, so that only the last one is not full. Predictions are made as they
    are asked for: those of a level and of a batch are all that is held.

    Args:
        forward: gets at most `batch_size` samples.
        x_t: (B, C, H, W) noisy latents of each level.
        timesteps: () or (B,) of each level, in [0, 1000].
        text: the B prompts, at least one.
        batch_size: samples per forward.
    """
    samples = len(text)
    batches = batch_slices(len(x_t) * samples, batch_size)
    ready: dict[str, list[Tensor]] = {}
    forwards = 0
    for level in range(len(x_t)):
        while forwards * batch_size < (level + 1) * samples:
            rows, forwards = next(batches), forwards + 1
            timestep = _rows([of_level.expand(samples) for of_level in timesteps], rows)
            for name, predicted in forward(_rows(x_t, rows), timestep, _repeated(text, rows)).items():
                ready.setdefault(name, []).append(predicted)
        joined = {name: torch.cat(parts) for name, parts in ready.items()}
        ready = {name: [tensor[samples:]] for name, tensor in joined.items()}
        yield {name: tensor[:samples] for name, tensor in joined.items()}


def _rows(levels: Sequence[Tensor], rows: slice) -> Tensor:
    """Rows of `levels` laid end to end, equally many of each."""
    samples = len(levels[0])
    first, stop = rows.start // samples, -(-rows.stop // samples)
    return torch.cat(list(levels[first:stop]))[rows.start - first * samples : rows.stop - first * samples]


def _repeated(text: TextEmbeds, rows: slice) -> TextEmbeds:
    """Rows of `text` repeated endlessly."""
    return text[torch.arange(rows.start, rows.stop, device=text.index.device) % len(text)]
