"""The loss of groups at one noise level, exact for any micro-batch size. DGPO and Diffusion-DPO share it.

A group's score needs the denoising losses of all its samples before one of them can be back-propagated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from dgpo_kernels import DGPOLoss, dgpo_loss
from torch import Tensor

from dgpo_fast.models.forward import batch_slices, predict, wide
from dgpo_fast.models.policy import PolicyModels, autocast
from dgpo_fast.objectives.batch import add_metrics
from dgpo_fast.objectives.comparison import Comparison
from dgpo_fast.objectives.drift import drift_terms, mean_square
from dgpo_fast.objectives.kl_term import weighed

ReduceScores = Callable[[Tensor], Tensor]
"""A micro-batch's parts of its samples' group scores → the whole scores, (B,) each."""


@dataclass(frozen=True)
class GroupLoss:
    """mean_g softplus(s_g)/β + kl_weight · KL + norm_hinge · hinge over a whole `Comparison` (`dgpo_kernels.dgpo_loss`,
    `drift.norm_hinge`), or with the KL term of `kl_term.weighed` if samples differ in its weight.

    Attributes:
        beta, clip_range, kl_weight: as `dgpo_kernels.dgpo_loss` takes them.
        kl_growth: as `kl_term.weighed` takes it.
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
    kl_growth: float = 0.0
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
        terms, total = self._drift(comparison, policy_v, rows), loss.loss
        if self.norm_hinge:
            total = total + self.norm_hinge * terms["norm_hinge"]
        if self._weighs_each(comparison):
            kl, gate = self._kl(comparison, policy_v, rows), comparison.kl_gate
            gate = None if gate is None else gate[comparison.own(rows)]
            terms["kl"] = kl.sum() / comparison.samples
            total = total + weighed(kl, self.kl_weight, self.kl_growth, gate).sum() / comparison.samples
        (weight * total).backward()
        count = (rows.stop - rows.start) * comparison.row_samples
        metrics = {"loss": total.detach(), **{name: value.detach() for name, value in terms.items()}}
        add_metrics(metrics, _means(loss, count), count / comparison.samples)
        return metrics

    def _weighs_each(self, comparison: Comparison) -> bool:
        """Whether samples differ in the weight of their KL terms, which `dgpo_loss` cannot."""
        return self.kl_weight > 0 and (self.kl_growth > 0 or comparison.kl_gate is not None)

    def _kl(self, comparison: Comparison, policy_v: Tensor, rows: slice) -> Tensor:
        """Of each own sample of `rows`."""
        ref_v = comparison.ref_v if comparison.kl_v is None else comparison.kl_v
        return mean_square(wide(policy_v) - wide(comparison.spread(ref_v[rows], rows)))

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

        kl_weight = 0.0 if self._weighs_each(comparison) else self.kl_weight
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
            kl_v=kl_v if kl_weight > 0 else None,
            kl_weight=kl_weight,
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
