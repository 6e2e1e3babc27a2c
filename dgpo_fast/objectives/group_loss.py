"""The loss of groups at one noise level, exact for any micro-batch size. DGPO and Diffusion-DPO share it.

A group's score needs the denoising losses of all its samples before one of them can be back-propagated.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from dgpo_kernels import DGPOLoss, dgpo_loss, group_noise
from torch import Tensor

from dgpo_fast.distributed import BatchPart
from dgpo_fast.models.forward import batch_slices, predict
from dgpo_fast.models.policy import PolicyModels, autocast
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.levels import Forward, predict_levels

ReduceScores = Callable[[Tensor], Tensor]
"""A micro-batch's parts of its samples' group scores → the whole scores, (B,) each."""


@dataclass(frozen=True)
class Comparison:
    """Whole groups at one noise level, and the predictions that the policy is compared with. No tensor has a gradient.

    Attributes:
        x0, x_t: (B, C, H, W) clean and noisy latents.
        timestep: () or (B,), in [0, 1000].
        text: the B prompts.
        advantage: (B,) fp32.
        group_index: (B,) int64.
        group_size: samples per group.
        ref_v, old_v, kl_v: (B, C, H, W) velocities of the reference, of θ_old (None: no clip), and of the KL term's
            reference (None: `ref_v`).
        seed, draw: of the noise in `x_t`.
        part: where these samples stand among those of all processes; None if they are all.
        padding: see `Batch.padding`.
    """

    x0: Tensor
    x_t: Tensor
    timestep: Tensor
    text: TextEmbeds
    advantage: Tensor
    group_index: Tensor
    group_size: int
    ref_v: Tensor
    seed: int
    draw: int
    old_v: Tensor | None = None
    kl_v: Tensor | None = None
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

    def own(self, rows: slice) -> slice:
        """Those of `rows` that are no padding: the first ones, or none."""
        return slice(rows.start, max(rows.start, min(rows.stop, len(self) - self.padding)))

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class Level:
    """A noise level: its σ and timestep, () or (B,) each, and the number of its noise."""

    sigma: Tensor
    timestep: Tensor
    draw: int


def compare(
    batch: Batch, levels: Sequence[Level], forward: Forward, *, seed: int, batch_size: int, at_once: int
) -> Iterator[Comparison]:
    """The samples of `batch` at each of `levels`, beside what frozen weights predict there; nothing of no samples.

    Args:
        batch: whole groups, each of which shares its noise.
        levels: in this order.
        forward: predicts `ref_v`, and `old_v` and `kl_v` if they are needed; see `Comparison`.
        seed: of the noise.
        batch_size: samples per forward.
        at_once: levels that are predicted together.
    """
    if len(batch.x0) == 0:
        if batch.part is not None:
            for _ in levels:  # the others may add up the scores of groups that they share
                batch.part.sum_group_scores(batch.advantage)
        return
    for slots in batch_slices(len(levels), at_once):
        some = levels[slots]
        x_t = [group_noise(batch.x0, of.sigma, batch.group_index, seed=seed, draw=of.draw) for of in some]
        timesteps = [of.timestep for of in some]
        predictions = predict_levels(forward, x_t, timesteps, batch.text, batch_size)
        for level, noisy, predicted in zip(some, x_t, predictions, strict=True):
            yield Comparison(
                x0=batch.x0,
                x_t=noisy,
                timestep=level.timestep,
                text=batch.text,
                advantage=batch.advantage,
                group_index=batch.group_index,
                group_size=batch.group_size,
                seed=seed,
                draw=level.draw,
                part=batch.part,
                padding=batch.padding,
                **predicted,
            )


@dataclass(frozen=True)
class GroupLoss:
    """mean_g softplus(s_g)/β + kl_weight · KL over a whole `Comparison` (`dgpo_kernels.dgpo_loss`).

    Attributes:
        beta, clip_range, kl_weight: as `dgpo_kernels.dgpo_loss` takes them.
        micro_batch: samples per forward and backward.
        forward_batch: samples per forward without a gradient.
    """

    beta: float
    micro_batch: int
    forward_batch: int
    clip_range: float | None = None
    kl_weight: float = 0.0

    def backward(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """Adds the gradient of `weight` times the loss to the policy; returns the loss and per-sample means."""
        if comparison.split and len(comparison) <= self.micro_batch:
            return self._split_groups(comparison, models, weight)
        if comparison.split or comparison.group_size > self.micro_batch:
            return self._two_passes(comparison, models, weight)
        return self._whole_groups(comparison, models, weight)

    def _whole_groups(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """Micro-batches of whole groups: each finds the scores of its own."""
        metrics: dict[str, Tensor] = {}
        size = self.micro_batch // comparison.group_size * comparison.group_size
        for rows in batch_slices(len(comparison), size):
            add_metrics(metrics, self._learn(comparison, models, weight, rows, None), 1.0)
        return metrics

    def _split_groups(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """One micro-batch on each process: between forward and backward they add up the scores of groups they share."""
        assert comparison.part is not None
        everything = slice(0, len(comparison))
        return self._learn(comparison, models, weight, everything, comparison.part.sum_group_scores)

    def _two_passes(self, comparison: Comparison, models: PolicyModels, weight: float) -> dict[str, Tensor]:
        """Micro-batches below a group, whose weight σ(s) needs all of its samples: a pass without gradients finds s."""
        group_score = self._group_score(comparison, models)
        metrics: dict[str, Tensor] = {}
        for rows in batch_slices(len(comparison), self.micro_batch):
            known = partial(_known, group_score[comparison.own(rows)])
            add_metrics(metrics, self._learn(comparison, models, weight, rows, known), 1.0)
        return metrics

    def _learn(
        self, comparison: Comparison, models: PolicyModels, weight: float, rows: slice, scores: ReduceScores | None
    ) -> dict[str, Tensor]:
        """Forward and backward of the micro-batch `rows`; its part of the metrics.

        `scores` gives the scores of groups that are not whole in `rows`; see `dgpo_kernels.dgpo_loss`.
        """
        loss = self._loss(comparison, _policy_v(comparison, models, rows), rows, scores)
        (weight * loss.loss).backward()
        count = rows.stop - rows.start
        metrics = {"loss": loss.loss.detach()}
        add_metrics(metrics, _means(loss, count), count / comparison.samples)
        return metrics

    @torch.no_grad()
    def _group_score(self, comparison: Comparison, models: PolicyModels) -> Tensor:
        """s of each own sample's group, from a pass over all samples without a gradient."""
        batches = batch_slices(len(comparison), self.forward_batch)
        policy_v = torch.cat([_policy_v(comparison, models, rows) for rows in batches])
        scores = comparison.part.sum_group_scores if comparison.part is not None and comparison.split else None
        return self._loss(comparison, policy_v, slice(0, len(comparison)), scores).group_score

    def _loss(self, comparison: Comparison, policy_v: Tensor, rows: slice, scores: ReduceScores | None) -> DGPOLoss:
        """Of the policy's predictions for `rows`; the padding among them is left out."""
        rows = comparison.own(rows)
        ref_v = comparison.ref_v[rows]
        kl_v = ref_v if comparison.kl_v is None else comparison.kl_v[rows]
        return dgpo_loss(
            policy_v[: rows.stop - rows.start],
            ref_v,
            comparison.x0[rows],
            comparison.advantage[rows],
            comparison.group_index[rows],
            seed=comparison.seed,
            draw=comparison.draw,
            beta=self.beta,
            old_v=None if comparison.old_v is None else comparison.old_v[rows],
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
    timestep = comparison.timestep.expand(len(comparison))[rows]
    with autocast(models):
        return predict(models.policy, comparison.x_t[rows], timestep, comparison.text[rows])


def _means(loss: DGPOLoss, count: int) -> dict[str, Tensor]:
    """Means over `count` rows, of which those without a loss are padding and add nothing."""
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
