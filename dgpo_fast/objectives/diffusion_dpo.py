"""Diffusion-DPO (arXiv 2311.12908) on flow models: the best and the worst image of each group as a pair.

Each pair shares its noise ε and its noise level σ, whose logit is normal: x_t = (1 − σ)·x0 + σ·ε, target velocity
ε − x0. With d the mean squared error of a prediction, w the better and l the worse image,

    loss = −log sigmoid(−(β/2)·[(d_policy,w − d_reference,w) − (d_policy,l − d_reference,l)])

A pair is a group of two with the advantages +1 and −1, whose group score is that bracket times β/2: the loss is β times
the group loss.
"""

from functools import partial
from math import log

import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.models.forward import predict
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.comparison import compare
from dgpo_fast.objectives.equal_groups import sort_groups, zero_gradients
from dgpo_fast.objectives.group_loss import GroupLoss
from dgpo_fast.objectives.levels import Level, frozen_batch
from dgpo_fast.objectives.protocol import Objective, Traits
from dgpo_fast.seeds import stream_seed

PAIR = 2


class DiffusionDPOObjective(Objective):
    """Diffusion-DPO; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        levels = config.diffusion_dpo.timesteps if config.engine.batch_timesteps else 1
        return Traits(levels_at_once=levels, norm_hinge=True, shardable=True)

    def __init__(self, config: Config):
        self.config, self.needs = config.diffusion_dpo, self.traits(config)
        self.skip_equal_groups = config.engine.skip_equal_groups
        self.frozen_batch = frozen_batch(config.rollout, pairs=False)
        self.noise_seed = stream_seed(config.seed, "training noise")
        self.level_seed = stream_seed(config.seed, "noise levels")
        self.loss = GroupLoss(
            beta=self.config.beta,
            micro_batch=config.policy.micro_batch_size,
            forward_batch=config.rollout.batch_size,
            norm_hinge=config.regulariser.norm_hinge / self.config.beta,
        )

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`.

        Metrics are means over the pairs' samples and noise levels: `loss` of all pairs, the others of those whose
        rewards differ.
        """
        pairs = sort_groups(best_and_worst(batch))
        return pairs.learn(partial(self._learn, models=models), partial(self._learn_of_equal, models=models))

    def _learn_of_equal(self, pairs: Batch, models: PolicyModels) -> dict[str, Tensor]:
        """Pairs of equal rewards: each has the loss −log sigmoid(0), and a gradient from a hinge alone."""
        if not self.skip_equal_groups or self.loss.norm_hinge > 0:
            return self._learn(pairs, models)
        zero_gradients(models)
        return {"loss": torch.full((), log(2) * len(pairs.x0) / pairs.samples, device=pairs.x0.device)}

    def _learn(self, pairs: Batch, models: PolicyModels) -> dict[str, Tensor]:
        """Adds the gradient of `pairs`, and returns their part of the metrics."""
        count = self.config.timesteps
        totals: dict[str, Tensor] = {}
        for comparison in compare(
            pairs,
            [self._level(pairs, draw=pairs.iteration * count + slot) for slot in range(count)],
            partial(_predict, models),
            seed=self.noise_seed,
            batch_size=self.frozen_batch,
            at_once=self.needs.levels_at_once,
        ):
            metrics = self.loss.backward(comparison, models, weight=self.config.beta / count)
            metrics["loss"] = self.config.beta * metrics["loss"]
            add_metrics(totals, metrics, 1 / count)
        return totals

    def _level(self, pairs: Batch, draw: int) -> Level:
        sigma = self._noise_levels(pairs, draw)
        return Level(sigma, 1000 * sigma, draw)

    def _noise_levels(self, pairs: Batch, draw: int) -> Tensor:
        """σ of each sample, (2P,) fp32, equal within a pair."""
        normal = philox_normal((1,), pairs.group_index, seed=self.level_seed, draw=draw)[:, 0]
        return torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)


def _predict(models: PolicyModels, x_t: Tensor, timestep: Tensor, text: TextEmbeds) -> dict[str, Tensor]:
    return {"ref_v": predict(models.base, x_t, timestep, text)}


def best_and_worst(batch: Batch) -> Batch:
    """The pairs of `batch`: the best and the worst sample of each group, with the advantages +1 and −1.

    A group whose rewards are all equal prefers nothing: its pair has the advantage 0, and no gradient.
    """
    everyone = batch.advantage if batch.part is None else batch.part.advantage
    by_group = everyone.reshape(batch.groups, batch.group_size)
    # In the order of their positions, so that a process's pairs lie together if a pair is held by two of them.
    positions, order = torch.stack([by_group.argmax(1), by_group.argmin(1)], dim=1).sort(dim=1)
    places = (positions + torch.arange(batch.groups, device=positions.device)[:, None] * batch.group_size).flatten()
    differ = (by_group.amax(1) > by_group.amin(1)).repeat_interleave(PAIR)
    advantage = (1.0 - 2.0 * order.flatten()) * differ
    return batch.among(places, advantage, PAIR)
