"""What an objective is."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.objectives.batch import Batch


class Objective(Protocol):
    """A way to turn scored groups into gradients. Made from the run's `Config` alone, and more than once.

    Attributes with a value may be left out by a class that is not derived from this one: that value is then meant.
    """

    needs_transitions: bool
    """Whether it needs every step of a rollout with noise (`Batch.transitions`), and not only the final latents."""
    levels_at_once: int = 1
    """Noise levels of an iteration's samples that frozen weights predict together (`levels.predict_levels`)."""
    guided_base: bool = False
    """Whether the base predicts pairs for guidance, and nothing else."""
    guided_policy: bool = False
    """Whether the policy does."""
    shardable: bool = False
    """Whether it runs on sharded weights, where all processes must make equally many forwards (`Batch.most`)."""

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """How an iteration's batch splits into optimizer steps: one step for each of these, in this order."""
        ...

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """Adds ∂loss/∂θ to the `.grad` of `models.weights` and returns 0-dim device tensors to log.

        The loss is a mean over `batch.samples`. With several processes, gradients and returned values are parts of
        that mean, which the loop adds up; a process may hold no sample of a batch.

        Args:
            batch: what was sampled and how it scored: one of `optimizer_batches`.
            models: base, policy and behaviour; the behaviour copy may be overwritten.
            old: θ_old.
        """
        ...
