"""The loss of groups at one noise level, exact for any micro-batch size. DGPO and Diffusion-DPO share it.

A group's score needs the denoising losses of all its samples before one of them can be back-propagated.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from dgpo_kernels import DGPOLoss, dgpo_loss
from torch import Tensor

from dgpo_fast.distributed import BatchPart
from dgpo_fast.models.forward import batch_slices, predict, wide
from dgpo_fast.models.policy import PolicyModels, autocast
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.drift import drift_terms
from dgpo_fast.objectives.levels import Forward, Inputs, Level, predict_levels

ReduceScores = Callable[[Tensor], Tensor]
"""A micro-batch's parts of its samples' group scores → the whole scores, (B,) each."""


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
        padding: see `Batch.padding`.
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
                **predicted,
            )


def _on_device(number: int, batch: Batch) -> Tensor:
    """() int64: made once a level, and not by each operator that makes its noise."""
    return torch.full((), number, device=batch.x0.device)


@dataclass(frozen=True)
class GroupLoss:
    """mean_g softplus(s_g)/β + kl_weight · KL + norm_hinge · hinge over a whole `Comparison` (`dgpo_kernels.dgpo_loss`,
    `drift.norm_hinge`).

    Attributes:
        beta, clip_range, kl_weight: as `dgpo_kernels.dgpo_loss` takes them.
        norm_hinge: the weight of the hinge; needs the base's velocity.
        ref_is_base: whether `ref_v` is the base's velocity without guidance, if no `base_v` was predicted.
        micro_batch: rows per forward and backward.
        forward_batch: rows per forward without a gradient.
    """

    beta: float
    micro_batch: int
    forward_batch: int
    clip_range: float | None = None
    kl_weight: float = 0.0
    norm_hinge: float = 0.0
    ref_is_base: bool = True

    def backward(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """Adds the gradient of `weight` times the loss to the policy; returns the loss and per-sample means."""
        if comparison.split and len(comparison.inputs) <= self.micro_batch:
            return self._split_groups(comparison, models, weight)
        if comparison.split or comparison.group_rows > self.micro_batch:
            return self._two_passes(comparison, models, weight)
        return self._whole_groups(comparison, models, weight)

    def _whole_groups(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """Micro-batches of whole groups: each finds the scores of its own."""
        metrics: dict[str, Tensor] = {}
        size = self.micro_batch // comparison.group_rows * comparison.group_rows
        for rows in batch_slices(len(comparison.inputs), size):
            add_metrics(metrics, self._learn(comparison, models, weight, rows, None), 1.0)
        return metrics

    def _split_groups(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """One micro-batch on each process: between forward and backward they add up the scores of groups they share."""
        assert comparison.part is not None
        everything = slice(0, len(comparison.inputs))
        return self._learn(comparison, models, weight, everything, comparison.part.sum_group_scores)

    def _two_passes(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """Micro-batches below a group, whose weight σ(s) needs all of its samples: a pass without gradients finds s."""
        group_score = self._group_score(comparison, models)
        metrics: dict[str, Tensor] = {}
        for rows in batch_slices(len(comparison.inputs), self.micro_batch):
            known = partial(_known, group_score[comparison.own(rows)])
            add_metrics(metrics, self._learn(comparison, models, weight, rows, known), 1.0)
        return metrics

    def _learn(
        self, comparison: Comparison, models: PolicyModels, weight: float, rows: slice, scores: ReduceScores | None
    ) -> dict[str, Tensor]:
        """Forward and backward of the micro-batch `rows`; its part of the metrics.

        `scores` gives the scores of groups that are not whole in `rows`; see `dgpo_kernels.dgpo_loss`.
        """
        policy_v = _policy_v(comparison, models, rows)
        loss = self._loss(comparison, policy_v, rows, scores)
        drift = self._drift(comparison, policy_v, rows)
        total = loss.loss + self.norm_hinge * drift["norm_hinge"] if self.norm_hinge else loss.loss
        (weight * total).backward()
        count = (rows.stop - rows.start) * comparison.row_samples
        metrics = {"loss": total.detach(), **{name: value.detach() for name, value in drift.items()}}
        add_metrics(metrics, _means(loss, count), count / comparison.samples)
        return metrics

    def _drift(self, comparison: Comparison, policy_v: Tensor, rows: slice) -> dict[str, Tensor]:
        """`drift_terms` of `rows`; nothing if the base was not predicted."""
        own_ref_v = comparison.ref_v if self.ref_is_base else comparison.base_v
        base_v = own_ref_v if comparison.base_v is None else comparison.base_v
        if base_v is None or own_ref_v is None:
            return {}
        ref_v = own_ref_v if comparison.kl_v is None else comparison.kl_v
        sigma = comparison.sigma.expand(len(comparison.inputs))
        own = [comparison.spread(values[rows], rows) for values in (base_v, ref_v, sigma)]
        return drift_terms(policy_v, *own, samples=comparison.samples, hinge=self.norm_hinge > 0)

    @torch.no_grad()
    def _group_score(self, comparison: Comparison, models: PolicyModels) -> Tensor:
        """s of each own sample's group, from a pass over all of them without a gradient."""
        batches = batch_slices(len(comparison.inputs), self.forward_batch)
        policy_v = torch.cat([_policy_v(comparison, models, rows) for rows in batches])
        scores = comparison.part.sum_group_scores if comparison.part is not None and comparison.split else None
        return self._loss(comparison, policy_v, slice(0, len(comparison.inputs)), scores).group_score

    def _loss(self, comparison: Comparison, policy_v: Tensor, rows: slice, scores: ReduceScores | None) -> DGPOLoss:
        """Of the policy's predictions for the own samples of `rows`."""

        def of_samples(velocity: Tensor | None) -> Tensor | None:
            return None if velocity is None else comparison.spread(velocity[rows], rows)

        samples, ref_v = comparison.own(rows), comparison.spread(comparison.ref_v[rows], rows)
        kl_v = ref_v if comparison.kl_v is None else of_samples(comparison.kl_v)
        return dgpo_loss(
            policy_v,
            ref_v,
            comparison.x0[samples],
            comparison.advantage[samples],
            comparison.group_index[samples],
            seed=comparison.seed,
            draw=comparison.draw,
            beta=self.beta,
            old_v=of_samples(comparison.old_v),
            clip_range=self.clip_range,
            kl_v=kl_v if self.kl_weight > 0 else None,
            kl_weight=self.kl_weight,
            num_groups=comparison.groups,
            group_size=comparison.group_size,
            reduce_group_scores=scores,
        )


def _known(group_score: Tensor, _: Tensor) -> Tensor:
    return group_score


def _policy_v(comparison: Comparison, models: PolicyModels, rows: slice) -> Tensor:
    """Of the own samples that the forward's `rows` are of."""
    read = comparison.inputs[rows]
    with autocast(models):
        velocity = predict(models.policy, read.x_t, read.timestep, read.text)
    # The gradients of a group's samples are added in fp32, and rounded once.
    return comparison.spread(wide(velocity) if comparison.shared else velocity, rows)


def _means(loss: DGPOLoss, count: int) -> dict[str, Tensor]:
    """Means over `count` samples, of which those without a loss are padding and add nothing."""
    values = {
        "dsm_policy": loss.dsm_policy,
        "dsm_gap": loss.dsm_policy - loss.dsm_ref,
        "group_weight": torch.sigmoid(loss.group_score.float()),
    }
    if loss.dsm_old is not None:
        values["clipped_fraction"] = loss.clipped.float()
    if loss.kl is not None:
        values["kl"] = loss.kl
    return {name: value.sum() / count for name, value in values.items()}
