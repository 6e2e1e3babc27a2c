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

    @property
    def groups(self) -> int:
        """The number of groups, including those of other processes."""
        return len(self) // self.group_size if self.part is None else self.part.groups

    @property
    def most(self) -> int:
        """See `BatchPart.most`."""
        return 0 if self.part is None else self.part.most

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
    """The samples of `batch` at each of `levels`, with the predictions of frozen weights.

    Args:
        batch: whole groups, each of which shares its noise.
        levels: in this order.
        forward: predicts `ref_v`, and `old_v` and `kl_v` if they are needed; see `Comparison`.
        seed: of the noise.
        batch_size: samples per forward.
        at_once: levels that are predicted together.
    """
    for slots in batch_slices(len(levels), at_once):
        some = levels[slots]
        x_t = [group_noise(batch.x0, of.sigma, batch.group_index, seed=seed, draw=of.draw) for of in some]
        timesteps = [of.timestep for of in some]
        predictions = predict_levels(forward, x_t, timesteps, batch.text, batch_size, batch.most)
        for level, noisy, predicted in zip(some, x_t, predictions, strict=True):
            if not predicted:  # of a process that holds no sample: nothing of it is read
                predicted = {"ref_v": noisy}
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
        metrics: dict[str, Tensor] = {}
        for rows, loss in self._micro_batches(comparison, models):
            (weight * loss.loss).backward()
            add_metrics(metrics, {"loss": loss.loss}, 1.0)
            share = (rows.stop - rows.start) / (comparison.groups * comparison.group_size)
            add_metrics(metrics, _means(loss), share)
        return metrics

    def _micro_batches(self, comparison: Comparison, models: PolicyModels) -> Iterator[tuple[slice, DGPOLoss]]:
        """Rows and loss of each micro-batch, ready for its backward pass."""
        part, everything = comparison.part, slice(0, len(comparison))
        most = max(len(comparison), comparison.most)
        split = part is not None and part.split
        group_score: Tensor | None = None
        size = self.micro_batch // comparison.group_size * comparison.group_size
        reduce: ReduceScores | None = part.sum_group_scores if part is not None and split else None
        if split and 0 < most <= self.micro_batch:
            policy_v = _policy_v(comparison, models, everything)
            if len(policy_v):
                yield everything, self._loss(comparison, policy_v, everything, reduce)
            elif reduce is not None:
                reduce(comparison.advantage)
                policy_v.sum().backward()
            return
        if split or size == 0:
            # A group does not fit. Its weight σ(s) needs all its samples, so a first pass without gradients computes s.
            size, group_score = self.micro_batch, self._group_score(comparison, models, reduce)
        for rows in batch_slices(len(comparison), size, most):
            policy_v = _policy_v(comparison, models, rows)
            if len(policy_v) == 0:
                policy_v.sum().backward()  # nothing to learn, but the others need this process's shards
                continue
            known = None if group_score is None else partial(_rows_of, group_score, rows)
            yield rows, self._loss(comparison, policy_v, rows, known)

    @torch.no_grad()
    def _group_score(self, comparison: Comparison, models: PolicyModels, reduce: ReduceScores | None) -> Tensor:
        """s of each sample's group, (B,), from a pass over all samples without gradients."""
        chunks = batch_slices(len(comparison), self.forward_batch, comparison.most)
        parts = [_policy_v(comparison, models, rows) for rows in chunks]
        if len(comparison) == 0:
            return comparison.advantage if reduce is None else reduce(comparison.advantage)
        policy_v = torch.cat(parts)
        return self._loss(comparison, policy_v, slice(0, len(comparison)), reduce).group_score

    def _loss(self, comparison: Comparison, policy_v: Tensor, rows: slice, reduce: ReduceScores | None) -> DGPOLoss:
        ref_v = comparison.ref_v[rows]
        kl_v = ref_v if comparison.kl_v is None else comparison.kl_v[rows]
        return dgpo_loss(
            policy_v,
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
            reduce_group_scores=reduce,
        )


def _rows_of(group_score: Tensor, rows: slice, _: Tensor) -> Tensor:
    return group_score[rows]


def _policy_v(comparison: Comparison, models: PolicyModels, rows: slice) -> Tensor:
    timestep = comparison.timestep.expand(len(comparison))[rows]
    with autocast(models):
        return predict(models.policy, comparison.x_t[rows], timestep, comparison.text[rows])


def _means(loss: DGPOLoss) -> dict[str, Tensor]:
    metrics = {
        "dsm_policy": loss.dsm_policy.mean(),
        "dsm_gap": (loss.dsm_policy - loss.dsm_ref).mean(),
        "group_weight": torch.sigmoid(loss.group_score.float()).mean(),
    }
    if loss.dsm_old is not None:
        metrics["clipped_fraction"] = loss.clipped.float().mean()
    if loss.kl is not None:
        metrics["kl"] = loss.kl.mean()
    return metrics
