"""Reinforce Adjoint Matching (arXiv 2605.10759): a regression from the base's velocity towards good images' own.

At each noise level, with x_t = (1 − σ)·x0 + σ·ε, v* = ε − x0 and m = `ram.multiplier`, the loss is the mean over
samples and noise levels of

    mean (v − stop[v_base + m·A·(v* − v_b)])²

v_b is θ_old's velocity, or the policy's own. No prediction has guidance, even if rollouts do. If v_b is the policy's
own, the gradient is that of Advantage Weighted Matching with ℓ = −d and the KL weight 1/m, times m.
"""

from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.objectives.denoising import DenoisingObjective, Noised, levels_at_once, step_from
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.protocol import Traits


class RAMObjective(DenoisingObjective):
    """Reinforce Adjoint Matching; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        return Traits(
            levels_at_once=levels_at_once(config, config.ram),
            drawn_by="old" if config.ram.residual == "old" else "any",
            norm_hinge=True,
            shardable=True,
        )

    def __init__(self, config: Config):
        super().__init__(config, config.ram, ref=True, old=config.ram.residual == "old")
        self.config = config.ram

    def losses(self, policy_v: Tensor, noised: Noised) -> dict[str, Tensor]:
        """See `DenoisingObjective.losses`."""
        ref_v, own = noised.velocity("ref_v"), policy_v.detach()
        from_v = noised.velocity("old_v") if self.old else own
        target = step_from(ref_v, self.config.multiplier * noised.batch.advantage, noised.target_v, from_v)
        distances = {"dsm_policy": noised.target_v, "kl": ref_v} | ({"old_distance": from_v} if self.old else {})
        found = {name: mean_square(own - of) for name, of in distances.items()}
        return found | {"loss": mean_square(policy_v - target)}
