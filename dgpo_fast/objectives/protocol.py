"""What an objective is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.objectives.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an objective needs of a run: asked of its class, so that nothing is made to find out.

    Attributes:
        needs_transitions: whether it needs every step of a rollout with noise (`Batch.transitions`), and not only the
            final latents.
        levels_at_once: noise levels of an iteration's samples that frozen weights predict together
            (`levels.predict_levels`).
        guided_base: whether the base predicts pairs for guidance, and nothing else.
        guided_policy: whether the policy predicts them with a gradient, and nothing else.
        frozen_policy: whether the policy also predicts without a gradient, beside the frozen weights.
        optimizer_steps: of an iteration, over which its groups are split.
        shared_sigma: σ of a noise level at which a group's samples may share one row of a forward
            (`objectives/first_level.py`); None if there is none.
        drawn_by: whose rollouts it must learn from: "policy" the policy's own, "old" those of θ_old from the first
            iteration on, "any" any.
        norm_hinge: whether it adds `regulariser.norm_hinge` to its loss (`objectives/drift.py`).
        single_images: whether it learns from single images with the advantage +1 or −1, and not from groups.
        kl_term: whether its loss has a KL term of a weight above 0, with `regulariser.kl_growth` and
            `Batch.kl_gate` (`objectives/kl_term.py`).
        shardable: whether it runs on sharded weights, where some rows of a batch may be padding (`Batch.weight`).
    """

    needs_transitions: bool = False
    levels_at_once: int = 1
    guided_base: bool = False
    guided_policy: bool = False
    frozen_policy: bool = False
    optimizer_steps: int = 1
    shared_sigma: float | None = None
    drawn_by: Literal["any", "policy", "old"] = "any"
    norm_hinge: bool = False
    single_images: bool = False
    kl_term: bool = False
    shardable: bool = False


class Objective(ABC):
    """A way to turn scored groups into gradients. Made from the run's `Config` alone."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """What it needs with these settings. `policy.micro_batch` may still be "auto"."""
        return Traits()

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """How an iteration's batch splits into optimizer steps: one step for each of these, in this order."""
        return [batch]

    @abstractmethod
    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """Adds ∂loss/∂θ to the `.grad` of `models.weights` and returns 0-dim device tensors to log.

        The loss is a mean over `batch.samples`. With several processes, gradients and returned values are parts of
        that mean, which the loop adds up; a process may hold no sample of a batch.

        Args:
            batch: what was sampled and how it scored: one of `optimizer_batches`.
            models: base, policy and behaviour; the behaviour copy may be overwritten.
            old: θ_old.
        """
