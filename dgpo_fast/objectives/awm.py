"""Advantage Weighted Matching (arXiv 2509.25050): flow matching on the policy's own images, weighted by the advantage.

At each noise level, with x_t = (1 − σ)·x0 + σ·ε, v* = ε − x0 and d = mean (v − v*)², a surrogate ℓ stands for the
logarithm of an image's probability, and ρ = exp(ℓ − ℓ_old). The loss is the mean over samples and noise levels of

    max(−A·ρ, −A·clamp(ρ, 1 − c, 1 + c)) + kl_weight · mean (v − v_base)² + ema_weight · mean (v − v_old)²

ℓ is −d ("uniform"), −σ·d ("sigma"), −σ²·d ("sigma2"), −σ·((d + 1e-10)^p − 1e-10^p)/p ("ghuber"), or half of that with
p = ½ ("huber"). Without a clip,
ℓ_old is ℓ without a gradient: ρ is 1, its gradient that of ℓ, and the policy itself must draw the images. With a clip,
ℓ_old is that of θ_old, which must draw them. With `awm.ratio` mean, ρ is one of each sample, exp of the mean of
ℓ − ℓ_old over its levels, found by a pass over all of them without a gradient; ρ's own gradient is again ρ·∇ℓ at each.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dgpo_fast.config.objective_options import AWM
from dgpo_fast.config.options import Config
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.denoising import DenoisingObjective, Noised, has_kl, levels_at_once, policy_v, sweep
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.equal_groups import sort_groups, zero_gradients
from dgpo_fast.objectives.protocol import Traits

SMALLEST_ERROR = 1e-10
"""Added to d, so that its power has a derivative at 0."""


class AWMObjective(DenoisingObjective):
    """Advantage Weighted Matching; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        return Traits(
            levels_at_once=levels_at_once(config, config.awm),
            drawn_by="policy" if config.awm.clip_range is None else "old",
            norm_hinge=True,
            kl_term=has_kl(config.awm),
            shardable=True,
        )

    def __init__(self, config: Config):
        awm = config.awm
        super().__init__(config, awm, ref=has_kl(awm), old=awm.ema_weight > 0 or awm.clip_range is not None)
        self.config, self.skip_equal_groups = awm, config.engine.skip_equal_groups

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`. Metrics are means over samples and noise levels.

        If no term holds the policy back, groups of equal rewards have no gradient and count in `loss` alone, as 0.
        """
        if len(batch.x0) == 0 or self.ref or self.config.ema_weight > 0:
            return super().accumulate(batch, models, old)
        groups = sort_groups(batch)
        if self.old and (groups.preferring is not None or not self.skip_equal_groups):
            models.load_behaviour(old)
        return groups.learn(partial(self.learn, models=models), partial(self._learn_of_equal, models=models))

    def _learn_of_equal(self, batch: Batch, models: PolicyModels) -> dict[str, Tensor]:
        if not self.skip_equal_groups:
            return self.learn(batch, models)
        zero_gradients(models)
        return {"loss": batch.x0.new_zeros(())}

    def learn(self, batch: Batch, models: PolicyModels) -> dict[str, Tensor]:
        """See `DenoisingObjective.learn`."""
        if self.config.ratio == "level" or self.config.clip_range is None:
            return super().learn(batch, models)
        levels, totals = self.drawn_levels(batch), {}  # type: ignore[var-annotated]
        # Frozen weights predict a second time: else the predictions at all levels would be held.
        ratios = [self._log_ratio(noised, models) for noised in self._noised(batch, levels, models)]
        log_ratio = torch.stack(ratios).mean(0)
        for noised in self._noised(batch, levels, models):
            known = replace(noised, predicted={**noised.predicted, "log_ratio": log_ratio})
            scale = 1 / (batch.samples * len(levels))
            add_metrics(totals, sweep(known, models, scale, self.micro_batch, self.losses, self.norm_hinge), 1.0)
        return totals

    @torch.no_grad()
    def _log_ratio(self, noised: Noised, models: PolicyModels) -> Tensor:
        """ℓ − ℓ_old of each sample at a level, (B,)."""
        parts = [noised[rows] for rows in batch_slices(len(noised), self.forward_batch)]
        velocities = ((policy_v(models, part.inputs), part.velocity("old_v"), part) for part in parts)

        def surrogate(velocity: Tensor, part: Noised) -> Tensor:
            return log_surrogate(mean_square(velocity - part.target_v), part.sigma, self.config)

        return torch.cat([surrogate(policy, part) - surrogate(old, part) for policy, old, part in velocities])

    def losses(self, policy_v: Tensor, noised: Noised) -> dict[str, Tensor]:
        """See `DenoisingObjective.losses`."""
        old_v = noised.velocity("old_v") if self.old else None
        found = self.with_kl(matching_loss(policy_v, old_v, noised, self.config), policy_v, noised, self.config)
        if old_v is not None:
            found["old_distance"] = mean_square(policy_v - old_v)
            found["loss"] = found["loss"] + self.config.ema_weight * found["old_distance"]
        return found


def matching_loss(policy_v: Tensor, old_v: Tensor | None, noised: Noised, config: AWM) -> dict[str, Tensor]:
    """Loss and metrics of each sample without the terms that hold the policy back, (B,) each.

    Args:
        policy_v: (B, C, H, W).
        old_v: as `policy_v`; only needed with a clip.
        noised: the B samples; `log_ratio` (B,), if it is there, stands for ℓ − ℓ_old.
        config: surrogate and clip.
    """
    error, advantage = mean_square(policy_v - noised.target_v), noised.batch.advantage
    surrogate = log_surrogate(error, noised.sigma, config)
    found = {"dsm_policy": error.detach()}
    if config.clip_range is None or old_v is None:
        return found | {"loss": -advantage * torch.exp(surrogate - surrogate.detach())}
    if "log_ratio" in noised.predicted:
        old = surrogate.detach() - noised.predicted["log_ratio"]
    else:
        old = log_surrogate(mean_square(old_v - noised.target_v), noised.sigma, config)
    ratio, clip = torch.exp(surrogate - old), config.clip_range
    unclipped, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return found | {
        "loss": torch.maximum(unclipped, clipped),
        "clipped_fraction": (clipped > unclipped).to(error.dtype),
    }


def log_surrogate(error: Tensor, sigma: Tensor, config: AWM) -> Tensor:
    """ℓ of each sample from d and σ, (B,) each."""
    if config.weighting in ("huber", "ghuber"):
        power, scale = (0.5, 1.0) if config.weighting == "huber" else (config.ghuber_power, 1 / config.ghuber_power)
        return -sigma * ((error + SMALLEST_ERROR) ** power - SMALLEST_ERROR**power) * scale
    return -(sigma ** {"uniform": 0, "sigma": 1, "sigma2": 2}[config.weighting]) * error
