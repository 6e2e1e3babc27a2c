"""Direct Group Preference Optimization (arXiv 2510.08425).

For each of M timesteps, every group shares one noise: x_t = (1 − σ)·x0 + σ·ε, target velocity ε − x0. With d the mean
squared error of a prediction, a group's score is s = (β/G) Σ A·(d_policy − d_reference), and the loss is the mean of
softplus(s)/β plus the KL term. The gradients of all micro-batches and timesteps are summed for one optimizer step per
iteration: θ and θ_old are constant within an iteration.
"""

from dataclasses import replace
from functools import partial
from math import log

import torch
from torch import Tensor

from dgpo_fast.config.objective_options import DGPO
from dgpo_fast.config.options import Config
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import guided, predict, predict_pair
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.comparison import compare
from dgpo_fast.objectives.equal_groups import sort_groups, zero_gradients
from dgpo_fast.objectives.first_level import first_sigma, is_shared
from dgpo_fast.objectives.group_loss import GroupLoss
from dgpo_fast.objectives.levels import Level, draw_training_steps, frozen_batch, training_sigmas
from dgpo_fast.objectives.noise_levels import NoiseLevels
from dgpo_fast.objectives.protocol import Objective, Traits
from dgpo_fast.records import Metrics
from dgpo_fast.seeds import stream_seed


class DGPOObjective(Objective):
    """DGPO; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        return Traits(
            levels_at_once=config.dgpo.timesteps if config.engine.batch_timesteps else 1,
            guided_base=Guidance(config.dgpo.kl_guidance_scale).pairs
            and (config.dgpo.kl_weight > 0 or _scores_against_guided(config.dgpo)),
            shared_sigma=first_sigma(config) if config.dgpo.lowest_sigma is None else None,
            norm_hinge=True,
            kl_term=config.dgpo.kl_weight > 0,
            shardable=True,
        )

    def __init__(self, config: Config):
        self.config, self.needs = config.dgpo, self.traits(config)
        self.skip_equal_groups = config.engine.skip_equal_groups
        self.share_first_level = config.engine.share_first_level
        self.frozen_batch = frozen_batch(config.rollout, pairs=self.needs.guided_base)
        self.seed = config.seed
        self.noise_seed = stream_seed(config.seed, "training noise")
        self.loss = GroupLoss(
            beta=self.config.beta,
            micro_batch=config.policy.micro_batch_size,
            forward_batch=config.rollout.batch_size,
            clip_range=self.config.clip_range,
            kl_weight=self.config.kl_weight,
            kl_growth=config.regulariser.kl_growth,
            norm_hinge=config.regulariser.norm_hinge,
            ref_is_base=self.config.reference == "frozen",
        )
        self.needs_base = self.config.kl_weight > 0 or self.loss.norm_hinge > 0

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`.

        Metrics are means over samples and timesteps: `loss` and `kl` over all groups, the others over groups whose
        rewards are not all equal.
        """
        groups = sort_groups(batch)
        if self._needs_old and (groups.preferring is not None or not self.skip_equal_groups):
            models.load_behaviour(old)
        return groups.learn(
            partial(self._learn, models=models, kl_alone=False), partial(self._learn_of_equal, models=models)
        )

    def _learn_of_equal(self, batch: Batch, models: PolicyModels) -> dict[str, Tensor]:
        """Groups of equal rewards: their s is always 0, so only what holds the policy at the base has a gradient."""
        if not self.skip_equal_groups:
            return self._learn(batch, models, kl_alone=False)
        if self.needs_base:
            return self._learn(batch, models, kl_alone=True)
        zero_gradients(models)
        share = len(batch.x0) / batch.samples
        return {"loss": torch.full((), share * log(2) / self.config.beta, device=batch.x0.device)}

    def _learn(self, batch: Batch, models: PolicyModels, *, kl_alone: bool) -> dict[str, Tensor]:
        """Adds the gradient of `batch`, and returns its part of the metrics."""
        levels = self._levels(batch, is_shared(self.share_first_level, self.needs.shared_sigma, models.dtype))
        loss = replace(self.loss, clip_range=None) if kl_alone else self.loss
        totals: Metrics = {}
        for comparison in compare(
            batch,
            levels,
            partial(self._predict, models, kl_alone),
            seed=self.noise_seed,
            batch_size=self.frozen_batch,
            at_once=self.needs.levels_at_once,
        ):
            add_metrics(totals, loss.backward(comparison, models, weight=1 / len(levels)), 1 / len(levels))
        return totals

    @property
    def _needs_old(self) -> bool:
        return self.config.clip_range is not None or self.config.reference == "ema"

    def _levels(self, batch: Batch, share_first: bool) -> list[Level]:
        """Of the iteration, on the rollout's grid or not; `share_first`: as `Level.shared`."""
        if (lowest := self.config.lowest_sigma) is not None:
            levels = NoiseLevels("uniform", self.config.timesteps, self.seed, lowest=lowest)
            return levels.draw(batch.iteration, batch.schedule, batch.group_index)
        among = min(self.config.high_noise_steps or batch.schedule.steps, batch.schedule.steps)
        steps = draw_training_steps(batch.iteration, count=self.config.timesteps, among=among, seed=self.seed)
        sigmas = training_sigmas(batch.schedule, self.config.training_sigma)
        return [
            Level(
                sigma=sigmas[step],
                timestep=batch.schedule.timesteps[step],
                draw=batch.iteration * len(steps) + slot,
                shared=share_first and step == 0,
            )
            for slot, step in enumerate(steps)
        ]

    def _predict(
        self, models: PolicyModels, kl_alone: bool, x_t: Tensor, timestep: Tensor, text: TextEmbeds
    ) -> dict[str, Tensor]:
        """Predictions of base and behaviour for some of the samples, by their names in `Comparison`."""
        found: dict[str, Tensor] = {}
        if self.needs.guided_base:
            ref_v, negative_v = predict_pair(models.base, x_t, timestep, text)
            guided_v = guided(models.base, ref_v, negative_v, self.config.kl_guidance_scale)
            found = {"ref_v": ref_v, "kl_v": guided_v}
            if _scores_against_guided(self.config):
                found = {"ref_v": guided_v, "base_v": ref_v}
        elif self.config.reference == "frozen" or self.needs_base:
            found["ref_v"] = predict(models.base, x_t, timestep, text)
        if self.config.reference == "ema" and found:
            found["base_v"] = found["ref_v"]
        if self._needs_old and not kl_alone:
            old_v = predict(models.behaviour, x_t, timestep, text)
            if self.config.clip_range is not None:
                found["old_v"] = old_v
            if self.config.reference == "ema":
                if self.config.kl_weight > 0:
                    found.setdefault("kl_v", found["ref_v"])
                found["ref_v"] = old_v
        return found


def _scores_against_guided(config: DGPO) -> bool:
    """Whether the group score has the KL term's reference: the base, with its guidance."""
    return config.guided_reference and config.reference == "frozen"
