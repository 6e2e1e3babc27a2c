"""Diffusion-DPO (arXiv 2311.12908) on flow models: the best and the worst image of each group as a pair.

Each pair shares its noise ε and its noise level σ, whose logit is normal: x_t = (1 − σ)·x0 + σ·ε, target velocity
ε − x0. With d the mean squared error of a prediction, w the better and l the worse image,

    loss = −log sigmoid(−(β/2)·[(d_policy,w − d_reference,w) − (d_policy,l − d_reference,l)])

A pair is a group of two with the advantages +1 and −1, whose group score is that bracket times β/2: the loss is β times
the group loss.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from dgpo_kernels import group_noise, philox_normal
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.groups import stream_seed
from dgpo_fast.objectives import Batch, add_metrics
from dgpo_fast.objectives.group_loss import Comparison, GroupLoss
from dgpo_fast.policy import PolicyModels, Weights
from dgpo_fast.rollout import predict_batched

PAIR = 2


class DiffusionDPOObjective:
    """The objective of one run; see the module's text for the loss."""

    needs_transitions = False

    def __init__(self, config: Config):
        self.config = config.diffusion_dpo
        self.forward_batch = config.rollout.batch_size
        self.noise_seed = stream_seed(config.seed, "training noise")
        self.level_seed = stream_seed(config.seed, "noise levels")
        self.loss = GroupLoss(
            beta=self.config.beta, micro_batch=config.policy.micro_batch_size, forward_batch=self.forward_batch
        )

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """One step an iteration."""
        return [batch]

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`. The metrics are means over the pairs' samples and noise levels."""
        pairs, count = best_and_worst(batch), self.config.timesteps
        totals: dict[str, Tensor] = {}
        for slot in range(count):
            comparison = self._compare(pairs, models, draw=batch.iteration * count + slot)
            metrics = self.loss.backward(comparison, models, weight=self.config.beta / count)
            metrics["loss"] = self.config.beta * metrics["loss"]
            add_metrics(totals, metrics, 1 / count)
        return totals

    def _compare(self, pairs: Batch, models: PolicyModels, draw: int) -> Comparison:
        sigma = self._noise_levels(pairs, draw)
        x_t = group_noise(pairs.x0, sigma, pairs.group_index, seed=self.noise_seed, draw=draw)
        timestep = 1000 * sigma
        return Comparison(
            x0=pairs.x0,
            x_t=x_t,
            timestep=timestep,
            text=pairs.text,
            advantage=pairs.advantage,
            group_index=pairs.group_index,
            group_size=PAIR,
            ref_v=predict_batched(models.base, x_t, timestep, pairs.text, self.forward_batch, pairs.most),
            seed=self.noise_seed,
            draw=draw,
            part=pairs.part,
        )

    def _noise_levels(self, pairs: Batch, draw: int) -> Tensor:
        """σ of each sample, (2P,) fp32, equal within a pair."""
        normal = philox_normal((1,), pairs.group_index, seed=self.level_seed, draw=draw)[:, 0]
        return torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)


def best_and_worst(batch: Batch) -> Batch:
    """The pairs of `batch`: the best and the worst sample of each group, with the advantages +1 and −1.

    A group whose rewards are all equal prefers nothing: its pair has the advantage 0, and no gradient.
    """
    everyone = batch.advantage if batch.part is None else batch.part.advantage
    by_group = everyone.reshape(batch.groups, batch.group_size)
    # In the order of their positions, so that a process's pairs lie together where a pair is held by two of them.
    positions, order = torch.stack([by_group.argmax(1), by_group.argmin(1)], dim=1).sort(dim=1)
    places = (positions + torch.arange(batch.groups, device=positions.device)[:, None] * batch.group_size).flatten()
    differ = (by_group.amax(1) > by_group.amin(1)).repeat_interleave(PAIR)
    advantage = (1.0 - 2.0 * order.flatten()) * differ
    if batch.part is None:
        return replace(batch[places], advantage=advantage, group_size=PAIR)
    first, stop = batch.part.first, batch.part.first + len(batch.x0)
    mine = (places >= first) & (places < stop)
    edges = None if batch.part.edges is None else tuple(int((places < edge).sum()) for edge in batch.part.edges)
    part = replace(batch.part, first=int((places < first).sum()), group_size=PAIR, advantage=advantage, edges=edges)
    rows = (places[mine] - first).to(batch.x0.device)
    return replace(batch[rows], advantage=advantage[mine].to(batch.x0.device), group_size=PAIR, part=part)
