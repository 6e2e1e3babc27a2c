"""DiffusionNFT (arXiv 2509.16117): a regression from θ_old's velocity towards good images and away from bad ones.

At each noise level, with x_t = (1 − σ)·x0 + σ·ε, v* = ε − x0, the advantage A in [−b, b] (b = `advantage.clamp` times
`advantage.scale`) and r = A/(2b) + ½, the policy's velocity v makes two predictions of x0, from

    v₊ = β·v + (1 − β)·v_old        v₋ = (1 + β)·v_old − β·v

and the loss is the mean over samples and noise levels of

    b·[ r·mean (x̂0₊ − x0)²/(w₊·β) + (1 − r)·mean (x̂0₋ − x0)²/(w₋·β) ] + kl_weight · mean (v − v_base)²

with w± = stop[max(mean |x̂0± − x0|, 1e-5)], or 1. For r, `nft.adv_mode` may change A first. x̂0± − x0 is
−σ·(v± − v*), and v± − v* is ±β times v's distance from v_old ± (v* − v_old)/β. So the errors are those of two
regressions (`objectives/denoising.py`).
"""

import torch
from torch import Tensor

from dgpo_fast.config.objective_options import NFT
from dgpo_fast.config.options import Config
from dgpo_fast.objectives.denoising import (
    DenoisingObjective,
    Noised,
    has_kl,
    levels_at_once,
    mean_abs,
    preference,
    step_from,
)
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.protocol import Traits

SMALLEST_WEIGHT = 1e-5
"""Below which w± do not fall."""


class NFTObjective(DenoisingObjective):
    """DiffusionNFT; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        return Traits(
            levels_at_once=levels_at_once(config, config.nft),
            drawn_by="old",
            optimizer_steps=config.nft.optimizer_steps,
            norm_hinge=True,
            kl_term=has_kl(config.nft),
            shardable=True,
        )

    def __init__(self, config: Config):
        super().__init__(config, config.nft, ref=has_kl(config.nft), old=True)
        self.config = config.nft

    def losses(self, policy_v: Tensor, noised: Noised) -> dict[str, Tensor]:
        """See `DenoisingObjective.losses`."""
        old_v = noised.velocity("old_v")
        found = {"loss": nft_loss(policy_v, old_v, noised, self.config, self.bound)}
        found = self.with_kl(found, policy_v, noised, self.config)
        distances = {"dsm_policy": noised.target_v, "old_distance": old_v}
        return found | {name: mean_square(policy_v.detach() - of) for name, of in distances.items()}


def nft_loss(policy_v: Tensor, old_v: Tensor, noised: Noised, config: NFT, bound: float) -> Tensor:
    """The loss of each sample without the KL term, (B,).

    Args:
        policy_v, old_v: (B, C, H, W).
        noised: the B samples.
        config: β, what becomes of advantages, and whether errors are weighted.
        bound: of the advantages.
    """
    share = preference(shaped(noised.batch.advantage, config.adv_mode), bound)
    scale = noised.sigma * config.beta
    loss = policy_v.new_zeros(len(policy_v))
    for sign, of_sign in ((1, share), (-1, 1 - share)):
        error = policy_v - step_from(old_v, sign / config.beta, noised.target_v, old_v)
        weight = (scale * mean_abs(error)).clamp(min=SMALLEST_WEIGHT) if config.adaptive_weight else 1.0
        loss = loss + bound / config.beta * of_sign * scale.square() * mean_square(error) / weight
    return loss


def shaped(advantage: Tensor, mode: str) -> Tensor:
    """Advantages as `nft.adv_mode` has them."""
    if mode == "positive_only":
        return advantage.clamp(min=0)
    if mode == "negative_only":
        return advantage.clamp(max=0)
    if mode == "one_only":
        return (advantage > 0).to(advantage.dtype)
    return torch.sign(advantage) if mode == "binary" else advantage
