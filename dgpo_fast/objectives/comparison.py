"""Groups at one noise level, beside the predictions that the policy is compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_fast.distributed import BatchPart
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.levels import Forward, Inputs, Level, predict_levels


@dataclass(frozen=True)
class Comparison:
    """Whole groups at one noise level, and the predictions that the policy is compared with. No tensor has a gradient.

    Attributes:
        x0: (B, C, H, W) clean latents.
        inputs: what the transformers read: R rows, one a sample, or one a group if the level is shared.
        advantage: (B,) fp32.
        group_index: (B,) int64.
        group_size: samples per group.
        sigma: () or (R,).
        ref_v, old_v, kl_v, base_v: (R, C, H, W) velocities of the reference, of θ_old (None: no clip), of the KL term's
            reference (None: `ref_v`), and of the base model without guidance (None: it was not predicted, or is
            `ref_v`, see `GroupLoss.ref_is_base`).
        seed, draw: () int64 each, of the noise.
        shared: see `Level`.
        part: where these samples stand among those of all processes; None if they are all.
        padding, kl_gate: see `Batch`.
    """

    x0: Tensor
    inputs: Inputs
    advantage: Tensor
    group_index: Tensor
    group_size: int
    sigma: Tensor
    ref_v: Tensor
    seed: Tensor
    draw: Tensor
    shared: bool = False
    old_v: Tensor | None = None
    kl_v: Tensor | None = None
    base_v: Tensor | None = None
    part: BatchPart | None = None
    padding: int = 0
    kl_gate: Tensor | None = None

    @property
    def groups(self) -> int:
        """The number of groups, including those of other processes."""
        return len(self) // self.group_size if self.part is None else self.part.groups

    @property
    def samples(self) -> int:
        """P·G, the samples that the loss is a mean over."""
        return self.groups * self.group_size

    @property
    def split(self) -> bool:
        """Whether some group is held by several processes."""
        return self.part is not None and self.part.split

    @property
    def row_samples(self) -> int:
        """Samples that a row of a forward is of."""
        return self.group_size if self.shared else 1

    @property
    def group_rows(self) -> int:
        """Rows of a forward that a whole group takes."""
        return self.group_size // self.row_samples

    def own(self, rows: slice) -> slice:
        """The process's own samples that the forward's `rows` are of; rows of padding have none."""
        start, stop = (max(row * self.row_samples - self._before, 0) for row in (rows.start, rows.stop))
        return slice(start, max(start, min(stop, len(self) - self.padding)))

    def spread(self, velocity: Tensor, rows: slice) -> Tensor:
        """`velocity` of the forward's `rows`, once for each of the samples `own(rows)`."""
        first, own = rows.start * self.row_samples - self._before, self.own(rows)
        if self.shared:  # the backward of an expansion is a sum in one order; that of an index need not be
            velocity = velocity[:, None].expand(-1, self.group_size, *velocity.shape[1:]).flatten(0, 1)
        return velocity[own.start - first : own.stop - first]

    @property
    def _before(self) -> int:
        """Samples of the first row that other processes hold."""
        return self.part.before if self.shared and self.part is not None else 0

    def __len__(self) -> int:
        return len(self.x0)


def compare(
    batch: Batch, levels: Sequence[Level], forward: Forward, *, seed: int, batch_size: int, at_once: int
) -> Iterator[Comparison]:
    """The samples of `batch` at each of `levels`, beside what frozen weights predict there; nothing of no samples.

    Args:
        batch: whole groups, each of which shares its noise.
        levels: in this order.
        forward: predicts `ref_v`, and `old_v`, `kl_v` and `base_v` if they are needed; see `Comparison`.
        seed: of the noise.
        batch_size: rows per forward.
        at_once: levels that are predicted together.
    """
    if len(batch.x0) == 0:
        if batch.part is not None:
            for _ in levels:  # the others may add up the scores of groups that they share
                batch.part.sum_group_scores(batch.advantage)
        return
    noise_seed = _on_device(seed, batch)
    for slots in batch_slices(len(levels), at_once):
        draws = [_on_device(level.draw, batch) for level in levels[slots]]
        inputs = [level.inputs(batch, noise_seed, draw) for level, draw in zip(levels[slots], draws, strict=True)]
        predictions = predict_levels(forward, inputs, batch_size)
        for draw, level, read, predicted in zip(draws, levels[slots], inputs, predictions, strict=True):
            yield Comparison(
                x0=batch.x0,
                inputs=read,
                advantage=batch.advantage,
                group_index=batch.group_index,
                group_size=batch.group_size,
                sigma=level.sigma,
                seed=noise_seed,
                draw=draw,
                shared=level.shared,
                part=batch.part,
                padding=batch.padding,
                kl_gate=batch.kl_gate,
                **predicted,
            )


def _on_device(number: int, batch: Batch) -> Tensor:
    """() int64: made once a level, and not by each operator that makes its noise."""
    return torch.full((), number, device=batch.x0.device)
