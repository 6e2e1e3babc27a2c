"""Flow-GRPO (arXiv 2505.05470): a policy gradient over every step of a rollout with noise.

A step goes from x to x' with the density of a Gaussian around μ(x) = x + b·v + a·x (`stochastic.py`). With ℓ the
logarithm of that density, the *mean* over the latent's elements, ρ = exp(ℓ_policy − ℓ_rollout) and s the diffusion
coefficient of the SDE, the loss is the mean over samples and steps of

    max(−A·ρ, −A·clamp(ρ, 1 − c, 1 + c)) + kl_weight · mean (μ_policy − μ_reference)² / (2·s²)

Every step but the last is trained, with the rollout's guidance. An iteration's groups are split over several optimizer
steps: from the second one on, the policy has moved away from the one that drew them, and the ratio is not 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.objectives import Batch, add_metrics, autocast
from dgpo_fast.policy import PolicyModels, Weights
from dgpo_fast.rollout import batch_slices, guided, predict, predict_batched, predict_pair, predict_pair_batched
from dgpo_fast.stochastic import gaussian_log_prob


class FlowGRPOObjective:
    """The objective of one run; see the module's text for the loss."""

    needs_transitions = True

    def __init__(self, config: Config):
        self.config = config.flow_grpo
        self.guidance_scale = config.rollout.guidance_scale
        self.micro_batch = config.policy.micro_batch_size
        self.forward_batch = config.rollout.batch_size

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """`flow_grpo.optimizer_steps` batches of whole groups."""
        return batch.split(self.config.optimizer_steps)

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`. The metrics are means over samples and steps."""
        steps = max(batch.schedule.steps - 1, 1)
        totals: dict[str, Tensor] = {}
        for step in range(steps):
            ref_mean = self._reference_mean(batch, models, step) if self.config.kl_weight > 0 else None
            for rows in batch_slices(len(batch.x0), self.micro_batch, batch.most):
                if rows.start == rows.stop:  # nothing to learn, but the others need this process's shards
                    self._policy_v(batch[rows], models, step).sum().backward()
                    continue
                share = (rows.stop - rows.start) / (batch.samples * steps)
                metrics = self._loss(batch[rows], models, step, None if ref_mean is None else ref_mean[rows])
                (share * metrics["loss"]).backward()
                add_metrics(totals, metrics, share)
        return totals

    def _loss(self, batch: Batch, models: PolicyModels, step: int, ref_mean: Tensor | None) -> dict[str, Tensor]:
        """The loss of step `step`, a mean over `batch`, and what to log of it."""
        assert batch.transitions is not None and batch.schedule.noise is not None
        mean = transition_mean(batch, step, self._policy_v(batch, models, step))
        std = batch.schedule.noise[step, 1]
        log_prob = gaussian_log_prob((batch.transitions.states[step + 1] - mean) / std, std)
        ratio, clip = torch.exp(log_prob - batch.transitions.log_prob[step]), self.config.clip_range
        unclipped, clipped = -batch.advantage * ratio, -batch.advantage * ratio.clamp(1 - clip, 1 + clip)
        metrics = {
            "loss": torch.maximum(unclipped, clipped).mean(),
            "clipped_fraction": (clipped > unclipped).float().mean(),
            "ratio_deviation": (ratio - 1).abs().mean(),
        }
        if ref_mean is not None:
            kl = (mean - ref_mean).square().mean() / (2 * diffusion(batch, step).square())
            metrics |= {"loss": metrics["loss"] + self.config.kl_weight * kl, "kl": kl}
        return metrics

    def _policy_v(self, batch: Batch, models: PolicyModels, step: int) -> Tensor:
        x, timestep = batch.transitions.states[step], batch.schedule.timesteps[step]  # type: ignore[union-attr]
        with autocast(models):
            if self.guidance_scale == 1:
                return predict(models.policy, x, timestep, batch.text)
            return guided(*predict_pair(models.policy, x, timestep, batch.text, batch.empty), self.guidance_scale)

    def _reference_mean(self, batch: Batch, models: PolicyModels, step: int) -> Tensor:
        x, timestep = batch.transitions.states[step], batch.schedule.timesteps[step]  # type: ignore[union-attr]
        if self.guidance_scale == 1:
            velocity = predict_batched(models.base, x, timestep, batch.text, self.forward_batch, batch.most)
        else:
            pair = predict_pair_batched(
                models.base, x, timestep, batch.text, batch.empty, self.forward_batch, batch.most
            )
            velocity = guided(*pair, self.guidance_scale)
        return transition_mean(batch, step, velocity)


def transition_mean(batch: Batch, step: int, velocity: Tensor) -> Tensor:
    """μ of step `step` from its state and `velocity` (B, C, H, W); fp32."""
    assert batch.transitions is not None and batch.schedule.noise is not None
    x = batch.transitions.states[step]
    return x + batch.schedule.coefficients[step, 0] * velocity.float() + batch.schedule.noise[step, 0] * x


def diffusion(batch: Batch, step: int) -> Tensor:
    """s, the SDE's diffusion coefficient at step `step`: a step's standard deviation is s·√(σ − σ_next)."""
    assert batch.schedule.noise is not None
    return batch.schedule.noise[step, 1] / (batch.schedule.sigmas[step] - batch.schedule.sigmas[step + 1]).sqrt()
