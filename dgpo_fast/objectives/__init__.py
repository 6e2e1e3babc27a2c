"""What the groups are used for: one protocol, one file an objective.

The training loop knows only `Objective`. It hands over an iteration's scored images, the objective adds the gradient of
its loss to the policy's parameters, and the loop takes the optimizer's step.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.policy import PolicyModels, Weights
from dgpo_fast.schedule import Schedule
from dgpo_fast.text import TextEmbeds


@dataclass(frozen=True)
class Batch:
    """One iteration's images, whole groups one after another.

    Attributes:
        iteration: counted from 0; keys every draw.
        x0: (B, C, H, W) fp32 final latents.
        text: the B prompts.
        empty: the empty prompt, one row.
        advantage: (B,) fp32.
        group_index: (B,) int64; equal within a group and different between the groups of an iteration. Keys the noise.
        group_size: G, samples per group.
        schedule: the rollout's grid.
    """

    iteration: int
    x0: Tensor
    text: TextEmbeds
    empty: TextEmbeds
    advantage: Tensor
    group_index: Tensor
    group_size: int
    schedule: Schedule

    @property
    def groups(self) -> int:
        """P, the groups in this batch."""
        return len(self.x0) // self.group_size


class Objective(Protocol):
    """A way to turn scored groups into a gradient."""

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """Adds ∂loss/∂θ to the `.grad` of `models.weights` and returns 0-dim device tensors to log.

        Args:
            batch: what was sampled and how it scored.
            models: base, policy and behaviour; the behaviour copy may be overwritten.
            old: θ_old.
        """
        ...


def make_objective(config: Config) -> Objective:
    """The objective that `config` names."""
    from dgpo_fast.objectives.dgpo import DGPOObjective

    return {"dgpo": DGPOObjective}[config.objective](config)
