"""Diffusion-KTO (arXiv 2404.04465) on flow models: single images that people like or dislike.

At each noise level, with x_t = (1 − σ)·x0 + σ·ε, v* = ε − x0, d = mean (v − v*)² and y = +1 for a liked image and −1
for a disliked one, the implied reward of an image is g = d_base − d_policy, and the loss is the mean over samples and
noise levels of

    w·(1 − sigmoid(y·(β·g − z)))        z = stop[max(0, mean β·g)]

z is what the iteration's images have in common: as the mean of a group in DGPO, it leaves what tells liked images from
others. w is 1 for a liked image. If the iteration does not lie in one micro-batch, a pass without gradients finds z.
That z is the mean over the iteration's own images is inferred, not read from the paper's code.
"""

from functools import partial

import torch
from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.denoising import DenoisingObjective, Noised, levels_at_once, policy_v, sweep
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.protocol import Traits


class KTOObjective(DenoisingObjective):
    """Diffusion-KTO; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        return Traits(levels_at_once=levels_at_once(config, config.kto), norm_hinge=True, single_images=True)

    def __init__(self, config: Config):
        super().__init__(config, config.kto, ref=True, old=False)
        self.config = config.kto

    def without_samples(self, batch: Batch) -> dict[str, Tensor]:
        """See `DenoisingObjective.without_samples`: the others add up their implied rewards."""
        for _ in self.drawn_levels(batch):
            _over_processes(batch.x0.new_zeros(()), batch)
        return {}

    def backward(self, noised: Noised, models: PolicyModels, scale: float) -> dict[str, Tensor]:
        """See `DenoisingObjective.backward`."""
        everyone = noised.batch.part is None or noised.batch.part.processes.count == 1
        alone = everyone and len(noised) <= self.micro_batch
        common = None if alone else self._common(noised, models)
        losses = partial(self.losses, common=common)
        return sweep(noised, models, scale, self.micro_batch, losses, self.norm_hinge)

    @torch.no_grad()
    def _common(self, noised: Noised, models: PolicyModels) -> Tensor:
        """z of all samples of all processes."""
        parts = [noised[rows] for rows in batch_slices(len(noised), self.forward_batch)]
        total = sum((implied_reward(policy_v(models, part.inputs), part).sum() for part in parts), start=0.0)
        mean = (
            _over_processes(torch.as_tensor(total, device=noised.batch.x0.device), noised.batch) / noised.batch.samples
        )
        return (self.config.beta * mean).clamp(min=0)

    def losses(self, policy_v: Tensor, noised: Noised, common: Tensor | None = None) -> dict[str, Tensor]:
        """See `DenoisingObjective.losses`. `common` is z; None: these samples are all."""
        scaled = self.config.beta * implied_reward(policy_v, noised)
        if common is None:
            common = scaled.detach().mean().clamp(min=0)
        advantage = noised.batch.advantage
        weight = torch.where(advantage < 0, self.config.disliked_weight, 1.0)
        found = {
            "loss": weight * torch.sigmoid(-advantage * (scaled - common)),
            "dsm_policy": mean_square(policy_v.detach() - noised.target_v),
        }
        everyone = advantage if noised.batch.part is None else noised.batch.part.advantage.to(advantage.device)
        for name, sign in (("liked", 1), ("disliked", -1)):  # a mean over all samples becomes one over these
            share = (sign * everyone > 0).double().mean().clamp(min=1e-9)
            found[f"dsm_gap_{name}"] = -scaled.detach() / self.config.beta * (sign * advantage > 0) / share
        return found


def implied_reward(policy_v: Tensor, noised: Noised) -> Tensor:
    """g of each sample, (B,): how much closer to its own velocity the policy predicts than the base does."""
    target_v = noised.target_v
    return mean_square(noised.velocity("ref_v") - target_v) - mean_square(policy_v - target_v)


def _over_processes(total: Tensor, batch: Batch) -> Tensor:
    if batch.part is None or batch.part.processes.count == 1:
        return total
    return batch.part.processes.sum(total, batch.part.what)
