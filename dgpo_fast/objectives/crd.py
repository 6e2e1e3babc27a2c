"""Centered Reward Distillation (arXiv 2603.14128): the policy's implicit rewards within a group become the real ones.

At each noise level, with x_t = (1 − σ)·x0 + σ·ε, v* = ε − x0, and b and r = A/(2b) + ½ as in DiffusionNFT
(`objectives/nft.py`), the implicit reward of an image is how much closer to it the policy predicts than θ_old does,

    r̂ = mean (v_old − v*)²/w_old − mean (v − v*)²/w        w = stop[mean |v − v*|], or 1

Both rewards are centred in the group, r̂_c = r̂ − stop[mean_g r̂] and r_c = r − mean_g r, which cancels what is unknown of
a prompt. The loss is the mean over samples and noise levels of

    (b/β)·(β·r̂_c − r_c)² + kl(r) · mean (v − v_base)²        kl(r) = kl_weight_worst + r·(kl_weight − kl_weight_worst)

or, with `crd.loss` bce, of (b/β)·BCE(sigmoid(β·r̂_c), sigmoid(r_c)) in place of the square. With a temperature T, the
first term is half of that for means with the weights softmax_g (r/T), and half for softmax_g (−r/T). v_base has
guidance: what it knows is distilled into the policy, and the most into the best images. If a group does not lie in one
micro-batch, a pass without gradients finds mean_g r̂ first.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from dgpo_fast.config.objective_options import CRD
from dgpo_fast.config.options import Config
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.objectives.batch import Batch, membership
from dgpo_fast.objectives.denoising import (
    DenoisingObjective,
    Noised,
    has_kl,
    levels_at_once,
    mean_abs,
    policy_v,
    preference,
    sweep,
)
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.protocol import Traits

GroupMeans = Callable[[Tensor, Noised], Tensor]
"""Values (B,) of samples, and the samples → each one's mean over its group, (B,)."""
Centres = Callable[[Tensor, Noised], Tensor]
"""Implicit rewards (B,) of samples, and the samples → what each is centred by, (B, D) for D kinds of weights."""


def weighted(means: GroupMeans, reward: Tensor, noised: Noised) -> Tensor:
    """`Centres` by `means`, with the weights `noised.predicted["weight"]`."""
    return torch.stack([means(weight * reward, noised) for weight in noised.predicted["weight"].unbind(1)], dim=1)


def in_groups(values: Tensor, noised: Noised) -> Tensor:
    """`GroupMeans` of whole groups, one after another."""
    size = noised.batch.group_size
    return values.reshape(-1, size).mean(1).repeat_interleave(size)


OF_WHOLE_GROUPS: Centres = partial(weighted, in_groups)


class CRDObjective(DenoisingObjective):
    """Centered Reward Distillation; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        return Traits(
            levels_at_once=levels_at_once(config, config.crd),
            guided_base=(has_kl(config.crd) or config.regulariser.norm_hinge > 0)
            and Guidance(config.crd.kl_guidance_scale).pairs,
            optimizer_steps=config.crd.optimizer_steps,
            norm_hinge=True,
            kl_term=has_kl(config.crd),
            shardable=True,
        )

    def __init__(self, config: Config):
        crd = config.crd
        super().__init__(config, crd, ref=has_kl(crd), old=True, guidance_scale=crd.kl_guidance_scale)
        self.config = crd

    def without_samples(self, batch: Batch) -> dict[str, Tensor]:
        """See `DenoisingObjective.without_samples`: the others may add up the rewards of groups that they share."""
        if batch.part is not None:
            for _ in range(len(self.drawn_levels(batch)) * (1 if self.config.temperature is None else 2)):
                batch.part.sum_group_scores(batch.advantage)
        return {}

    def backward(self, noised: Noised, models: PolicyModels, scale: float) -> dict[str, Tensor]:
        """See `DenoisingObjective.backward`."""
        batch, size = noised.batch, self.micro_batch
        split = batch.part is not None and batch.part.split
        noised = replace(noised, predicted={**noised.predicted, **self._wanted(batch)})
        centres = OF_WHOLE_GROUPS
        if split and len(noised) <= size:
            centres = partial(weighted, partial(_over_processes, padding=batch.padding))
        elif split or batch.group_size > size:
            noised, centres = self._with_means(noised, models), _known
        else:
            size = size // batch.group_size * batch.group_size
        return sweep(noised, models, scale, size, partial(self.losses, centres=centres), self.norm_hinge)

    def _with_means(self, noised: Noised, models: PolicyModels) -> Noised:
        """`noised` with the mean implicit rewards of each sample's group, from a pass without a gradient."""
        with torch.no_grad():
            parts = [noised[rows] for rows in batch_slices(len(noised), self.forward_batch)]
            reward = torch.cat([implicit_reward(policy_v(models, part.inputs), part, self.config) for part in parts])
        mean = weighted(partial(_over_processes, padding=noised.batch.padding), reward, noised)
        return replace(noised, predicted={**noised.predicted, "mean_reward": mean})

    def _wanted(self, batch: Batch) -> dict[str, Tensor]:
        """`weight` of each sample in its group's means, 1 on average, and `wanted`, its r_c: (B, D) each."""
        part = batch.part
        everyone = batch.advantage if part is None else part.advantage.to(batch.x0.device)
        advantage = everyone.reshape(-1, batch.group_size)
        reward = preference(advantage, self.bound)
        weight = group_weights(advantage, reward, self.config.temperature)
        wanted = reward[..., None] - (weight * reward[..., None]).mean(1, keepdim=True)
        position = torch.arange(len(batch.x0), device=everyone.device) + (0 if part is None else part.first)
        position = position.clamp(max=len(everyone) - 1)  # padding has a weight of 0
        return {"weight": weight.flatten(0, 1)[position], "wanted": wanted.flatten(0, 1)[position]}

    def losses(self, policy_v: Tensor, noised: Noised, centres: Centres = OF_WHOLE_GROUPS) -> dict[str, Tensor]:
        """See `DenoisingObjective.losses`. `noised.predicted` also has what `_wanted` gives."""
        reward, beta = implicit_reward(policy_v, noised, self.config), self.config.beta
        centred = reward[:, None] - centres(reward.detach(), noised)
        distance = _distance(beta * centred, noised.predicted["wanted"], self.config.loss).mean(1)
        found = self.with_kl({"loss": self.bound / beta * distance}, policy_v, noised, self.config)
        return found | {
            "dsm_policy": mean_square(policy_v.detach() - noised.target_v),
            "old_distance": mean_square(policy_v.detach() - noised.velocity("old_v")),
        }


def group_weights(advantage: Tensor, reward: Tensor, temperature: float | None) -> Tensor:
    """Weights of a group's means, which have the mean 1: (P, G, D).

    Args:
        advantage, reward: (P, G) A and r.
        temperature: None: one mean, of all alike; else two, of the better and of the worse images.
    """
    if temperature is None:
        return torch.ones_like(reward)[..., None]
    size = reward.shape[1]
    if temperature > 0:
        return size * torch.stack([torch.softmax(sign * reward / temperature, dim=1) for sign in (1, -1)], dim=-1)
    counted = torch.stack([advantage > 0, advantage < 0], dim=-1)
    counted = (counted | ~counted.any(1, keepdim=True)).to(reward.dtype)  # of a group without any such, all
    return size * counted / counted.sum(1, keepdim=True)


def implicit_reward(policy_v: Tensor, noised: Noised, config: CRD) -> Tensor:
    """r̂ of each sample, (B,)."""

    def error(velocity: Tensor) -> Tensor:
        difference = velocity - noised.target_v
        return mean_square(difference) / (mean_abs(difference) if config.adaptive_weight else 1.0)

    return error(noised.velocity("old_v")) - error(policy_v)


def _distance(scaled: Tensor, wanted: Tensor, kind: str) -> Tensor:
    if kind == "mse":
        return (scaled - wanted).square()
    return binary_cross_entropy_with_logits(scaled, torch.sigmoid(wanted), reduction="none")


def _known(values: Tensor, noised: Noised) -> Tensor:
    return noised.predicted["mean_reward"]


def _over_processes(values: Tensor, noised: Noised, *, padding: int) -> Tensor:
    """`GroupMeans` of all of a process's samples, of which the last `padding` are no samples; the processes that share
    a group must call it together."""
    part, size = noised.batch.part, noised.batch.group_size
    own = len(values) - padding
    member = membership(own, size, part, values)
    mean = (member @ values[:own] / size)[member.argmax(0)]
    return pad(mean if part is None else part.sum_group_scores(mean), (0, padding))
