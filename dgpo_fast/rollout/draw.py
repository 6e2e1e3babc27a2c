"""How images are drawn: one value for a run's rollouts, one for its evaluations."""

from dataclasses import dataclass

from dgpo_fast.models.forward import forwards_per_step, is_guided
from dgpo_fast.rollout.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Draw:
    """How images are drawn. Made once and compared by identity: a recorded rollout is of one `Draw`.

    Attributes:
        schedule: grid and coefficients, on the transformer's device.
        guidance_scale: v = v_neg + g·(v_cond − v_neg); 1 is unguided.
        batch_size: most samples in a batch.
    """

    schedule: Schedule
    guidance_scale: float
    batch_size: int

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is predicted too."""
        return is_guided(self.guidance_scale)

    @property
    def forwards_per_step(self) -> int:
        """Forwards of a sample in each step: 2 with guidance, else 1."""
        return forwards_per_step(self.guidance_scale)

    @property
    def forwards(self) -> int:
        """Forwards of a sample in a whole rollout."""
        return self.schedule.steps * self.forwards_per_step
