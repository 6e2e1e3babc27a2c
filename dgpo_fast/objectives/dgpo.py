"""Direct Group Preference Optimization (arXiv 2510.08425).

For each of M timesteps, every group shares one noise: x_t = (1 − σ)·x0 + σ·ε, target velocity ε − x0. With d the mean
squared error of a prediction, a group's score is s = (β/G) Σ A·(d_policy − d_reference), and the loss is the mean of
softplus(s)/β plus the KL term. All micro-batches and timesteps add up to one gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from dgpo_kernels import group_noise
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.groups import draw_training_steps, stream_seed
from dgpo_fast.objectives import Batch, add_metrics
from dgpo_fast.objectives.equal_groups import sort_groups
from dgpo_fast.objectives.group_loss import Comparison, GroupLoss
from dgpo_fast.policy import PolicyModels, Weights
from dgpo_fast.rollout import batch_slices, guided, predict_batched, predict_pair_batched

OF_ALL_GROUPS = ("loss", "kl")


@dataclass(frozen=True)
class Predictions:
    """What the policy is compared with; (B, C, H, W) each, or None where it is not needed."""

    ref_v: Tensor
    old_v: Tensor | None
    kl_v: Tensor | None

    def __getitem__(self, rows: slice) -> dict[str, Tensor | None]:
        """Those of some of the samples, by name. A KL reference that is the reference stays it: it is read once."""
        ref_v = self.ref_v[rows]
        kl_v = ref_v if self.kl_v is self.ref_v else None if self.kl_v is None else self.kl_v[rows]
        return {"ref_v": ref_v, "old_v": None if self.old_v is None else self.old_v[rows], "kl_v": kl_v}


class DGPOObjective:
    """The objective of one run; see the module's text for the loss."""

    needs_transitions = False

    def __init__(self, config: Config):
        self.config = config.dgpo
        self.engine = config.engine
        self.forward_batch = config.rollout.batch_size
        self.seed = config.seed
        self.noise_seed = stream_seed(config.seed, "training noise")
        self.loss = GroupLoss(
            beta=self.config.beta,
            micro_batch=config.policy.micro_batch_size,
            forward_batch=self.forward_batch,
            clip_range=self.config.clip_range,
            kl_weight=self.config.kl_weight,
        )

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """One step an iteration: θ and θ_old are constant inside it."""
        return [batch]

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`.

        Metrics are means over samples and timesteps: `loss` and `kl` of all groups, the others of those that prefer
        some image to another.
        """
        groups = sort_groups(batch)
        totals: dict[str, Any] = {}
        if self._needs_old and (groups.preferring is not None or not self.engine.skip_equal_groups):
            models.load_behaviour(old)
        if groups.preferring is not None:
            metrics = self._learn(groups.preferring, models, kl_alone=False)
            shares = {name: 1.0 if name in OF_ALL_GROUPS else groups.preferring_share for name in metrics}
            totals = {name: value / shares[name] for name, value in metrics.items()}
        if groups.equal is not None:
            metrics = self._learn_of_equal(groups.equal, models)
            add_metrics(totals, {name: metrics[name] for name in OF_ALL_GROUPS if name in metrics}, 1.0)
        return totals

    def _learn_of_equal(self, batch: Batch, models: PolicyModels) -> dict[str, Tensor]:
        """What groups of equal rewards add: their s is 0 whatever is predicted; the KL term alone has a gradient."""
        if not self.engine.skip_equal_groups:
            return self._learn(batch, models, kl_alone=False)
        if self.config.kl_weight > 0:
            return self._learn(batch, models, kl_alone=True)
        for weight in models.weights.values():
            # The optimizer's step goes on from a gradient of 0, and would be left out without one.
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype) if weight.grad is None else weight.grad
        share = len(batch.x0) / batch.samples
        return {"loss": torch.full((), share * log(2) / self.config.beta, device=batch.x0.device)}

    def _learn(self, batch: Batch, models: PolicyModels, *, kl_alone: bool) -> dict[str, Tensor]:
        """Adds the gradient of `batch`, and returns its part of the metrics."""
        steps = self._training_steps(batch)
        loss = replace(self.loss, clip_range=None) if kl_alone else self.loss
        totals: dict[str, Any] = {}
        for comparison in self._comparisons(batch, models, steps, kl_alone):
            add_metrics(totals, loss.backward(comparison, models, weight=1 / len(steps)), 1 / len(steps))
        return totals

    @property
    def _needs_old(self) -> bool:
        return self.config.clip_range is not None or self.config.reference == "ema"

    def _training_steps(self, batch: Batch) -> list[int]:
        among = min(self.config.high_noise_steps or batch.schedule.steps, batch.schedule.steps)
        return draw_training_steps(batch.iteration, count=self.config.timesteps, among=among, seed=self.seed)

    def _comparisons(
        self, batch: Batch, models: PolicyModels, steps: list[int], kl_alone: bool
    ) -> Iterator[Comparison]:
        """The samples at each of the grid's `steps`, beside what the frozen weights predict there."""
        together = len(steps) if self.engine.batch_timesteps else 1
        for slots in batch_slices(len(steps), together):
            draws = [batch.iteration * len(steps) + slot for slot in range(slots.start, slots.stop)]
            sigmas, timesteps = (
                torch.stack([of[step] for step in steps[slots]])
                for of in (batch.schedule.sigmas, batch.schedule.timesteps)
            )
            x_t = [
                group_noise(batch.x0, sigma, batch.group_index, seed=self.noise_seed, draw=draw)
                for sigma, draw in zip(sigmas, draws, strict=True)
            ]
            predictions = self._predict(batch, models, torch.cat(x_t), timesteps, kl_alone)
            for index, draw in enumerate(draws):
                yield Comparison(
                    x0=batch.x0,
                    x_t=x_t[index],
                    timestep=timesteps[index],
                    text=batch.text,
                    advantage=batch.advantage,
                    group_index=batch.group_index,
                    group_size=batch.group_size,
                    seed=self.noise_seed,
                    draw=draw,
                    part=batch.part,
                    **predictions[index * len(batch.x0) : (index + 1) * len(batch.x0)],  # type: ignore[arg-type]
                )

    def _predict(
        self, batch: Batch, models: PolicyModels, x_t: Tensor, timesteps: Tensor, kl_alone: bool
    ) -> Predictions:
        """What base and behaviour predict for `x_t`: the samples of `batch` at one noise level after another."""
        inputs = (x_t, timesteps.repeat_interleave(len(batch.x0)), batch.text)
        most = batch.most * len(timesteps)
        ref_v, old_v, kl_v = None, None, None
        if self.config.kl_guidance_scale > 1 and self.config.kl_weight > 0:
            ref_v, empty_v = predict_pair_batched(models.base, *inputs, batch.empty, self.forward_batch, most)
            kl_v = guided(ref_v, empty_v, self.config.kl_guidance_scale)
        elif self.config.reference == "frozen" or self.config.kl_weight > 0:
            ref_v = predict_batched(models.base, *inputs, self.forward_batch, most)
            kl_v = ref_v if self.config.kl_weight > 0 else None
        if self._needs_old and not kl_alone:
            old_v = predict_batched(models.behaviour, *inputs, self.forward_batch, most)
        reference = old_v if self.config.reference == "ema" and not kl_alone else ref_v
        assert reference is not None
        return Predictions(reference, old_v if self.config.clip_range is not None else None, kl_v)
