"""Direct Group Preference Optimization (arXiv 2510.08425).

For each of M timesteps, every group shares one noise: x_t = (1 − σ)·x0 + σ·ε, target velocity ε − x0. With d the mean
squared error of a prediction, a group's score is s = (β/G) Σ A·(d_policy − d_reference), and the loss is the mean of
softplus(s)/β plus the KL term. All micro-batches and timesteps add up to one gradient.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from dgpo_kernels import DGPOLoss, dgpo_loss, group_noise
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.groups import draw_training_steps, stream_seed
from dgpo_fast.objectives import Batch
from dgpo_fast.policy import PolicyModels, Weights
from dgpo_fast.rollout import predict, predict_pair


@dataclass(frozen=True)
class Targets:
    """What the policy is compared with at one timestep; all (B, C, H, W), none with a gradient."""

    draw: int
    timestep: Tensor
    x_t: Tensor
    ref_v: Tensor
    old_v: Tensor | None
    kl_v: Tensor | None

    def rows(self, rows: slice) -> "Targets":
        """The same for some of the samples."""
        old_v = None if self.old_v is None else self.old_v[rows]
        kl_v = None if self.kl_v is None else self.kl_v[rows]
        return Targets(self.draw, self.timestep, self.x_t[rows], self.ref_v[rows], old_v, kl_v)


class DGPOObjective:
    """The objective of one run; see the module's text for the loss."""

    def __init__(self, config: Config):
        self.config = config.dgpo
        self.micro_batch = config.policy.micro_batch
        self.forward_batch = config.rollout.batch_size
        self.seed = config.seed
        self.noise_seed = stream_seed(config.seed, "training noise")

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`. The metrics are means over samples and timesteps."""
        if self._needs_old:
            models.load_behaviour(old)
        steps = self._training_steps(batch)
        totals: dict[str, Tensor] = {}
        for slot, step in enumerate(steps):
            targets = self._targets(batch, models, step, draw=batch.iteration * len(steps) + slot)
            for rows, loss in self._micro_batches(batch, models, targets):
                (loss.loss / len(steps)).backward()
                _add(totals, self._metrics(loss), (rows.stop - rows.start) / (len(batch.x0) * len(steps)))
                _add(totals, {"loss": loss.loss.detach()}, 1 / len(steps))
        return totals

    @property
    def _needs_old(self) -> bool:
        return self.config.clip_range is not None or self.config.reference == "ema"

    def _training_steps(self, batch: Batch) -> list[int]:
        among = min(self.config.high_noise_steps or batch.schedule.steps, batch.schedule.steps)
        return draw_training_steps(batch.iteration, count=self.config.timesteps, among=among, seed=self.seed)

    @torch.no_grad()
    def _targets(self, batch: Batch, models: PolicyModels, step: int, draw: int) -> Targets:
        """Noise at grid step `step`, and what base and behaviour predict there for the whole batch."""
        timestep, sigma = batch.schedule.timesteps[step], batch.schedule.sigmas[step]
        x_t = group_noise(batch.x0, sigma, batch.group_index, seed=self.noise_seed, draw=draw)
        ref, old, kl = [], [], []
        for rows in _slices(len(x_t), self.forward_batch):
            if self.config.kl_guidance_scale > 1 and self.config.kl_weight > 0:
                conditional, unconditional = predict_pair(
                    models.base, x_t[rows], timestep, batch.text[rows], batch.empty
                )
                kl.append(unconditional + self.config.kl_guidance_scale * (conditional - unconditional))
                ref.append(conditional)
            elif self.config.reference == "frozen" or self.config.kl_weight > 0:
                ref.append(predict(models.base, x_t[rows], timestep, batch.text[rows]))
            if self._needs_old:
                old.append(predict(models.behaviour, x_t[rows], timestep, batch.text[rows]))
        ref_v, old_v = (torch.cat(parts) if parts else None for parts in (ref, old))
        kl_v = (torch.cat(kl) if kl else ref_v) if self.config.kl_weight > 0 else None
        reference = old_v if self.config.reference == "ema" else ref_v
        assert reference is not None
        return Targets(draw, timestep, x_t, reference, old_v if self.config.clip_range is not None else None, kl_v)

    def _micro_batches(self, batch: Batch, models: PolicyModels, targets: Targets) -> Iterator[tuple[slice, DGPOLoss]]:
        """Rows and loss of each micro-batch, ready for its backward pass."""
        size = self.micro_batch // batch.group_size * batch.group_size
        group_score = None
        if size == 0:
            # A group does not fit: its weight σ(s) needs all its samples first, so one pass without gradients finds s.
            size = self.micro_batch
            with torch.no_grad():
                parts = [
                    self._policy_v(batch, models, targets, rows) for rows in _slices(len(batch.x0), self.forward_batch)
                ]
                group_score = self._loss(batch, torch.cat(parts), targets, slice(0, len(batch.x0)), None).group_score
        for rows in _slices(len(batch.x0), size):
            policy_v = self._policy_v(batch, models, targets, rows)
            yield rows, self._loss(batch, policy_v, targets, rows, group_score)

    def _policy_v(self, batch: Batch, models: PolicyModels, targets: Targets, rows: slice) -> Tensor:
        with _autocast(models):
            return predict(models.policy, targets.x_t[rows], targets.timestep, batch.text[rows])

    def _loss(
        self, batch: Batch, policy_v: Tensor, targets: Targets, rows: slice, group_score: Tensor | None
    ) -> DGPOLoss:
        mine = targets.rows(rows)
        return dgpo_loss(
            policy_v,
            mine.ref_v,
            batch.x0[rows],
            batch.advantage[rows],
            batch.group_index[rows],
            seed=self.noise_seed,
            draw=targets.draw,
            beta=self.config.beta,
            old_v=mine.old_v,
            clip_range=self.config.clip_range,
            kl_v=mine.kl_v,
            kl_weight=self.config.kl_weight,
            num_groups=batch.groups,
            group_size=batch.group_size,
            reduce_group_scores=None if group_score is None else lambda _: group_score[rows],
        )

    def _metrics(self, loss: DGPOLoss) -> dict[str, Tensor]:
        metrics = {
            "dsm_policy": loss.dsm_policy.mean(),
            "dsm_gap": (loss.dsm_policy - loss.dsm_ref).mean(),
            "clipped_fraction": loss.clipped.float().mean(),
            "group_weight": torch.sigmoid(loss.group_score.float()).mean(),
        }
        if loss.kl is not None:
            metrics["kl"] = loss.kl.mean()
        return metrics


def _autocast(models: PolicyModels) -> AbstractContextManager:
    return torch.autocast(models.device.type, dtype=torch.bfloat16, enabled=models.mixed)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _add(totals: dict[str, Tensor], values: dict[str, Tensor], weight: float) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + weight * value.detach()
