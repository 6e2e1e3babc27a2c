"""How images are drawn: one value for a run's rollouts, one for its evaluations."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dgpo_fast.config.options import Config
from dgpo_fast.models.family import Family, Grid, Guidance
from dgpo_fast.models.own_settings import own_grid
from dgpo_fast.rollout.schedule import Schedule, make_schedule


@dataclass(frozen=True, eq=False)
class Draw:
    """How images are drawn. Made once and compared by identity: a recorded rollout is of one `Draw`.

    Attributes:
        schedule: grid and coefficients, on the transformer's device.
        guidance: what the setting `guidance_scale` means to the model.
        batch_size: most samples in a batch.
    """

    schedule: Schedule
    guidance: Guidance
    batch_size: int

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is predicted too."""
        return self.guidance.pairs

    @property
    def forwards_per_step(self) -> int:
        """Forwards of a sample in each step: 2 with guidance, else 1."""
        return self.guidance.forwards

    @property
    def forwards(self) -> int:
        """Forwards of a sample in a whole rollout."""
        return self.schedule.steps * self.forwards_per_step


class Drawn(Protocol):
    """Settings of drawing: a run's rollout or evaluation, or an evaluation's."""

    solver: Any
    num_inference_steps: int
    guidance_scale: float


def make_draw(
    family: Family,
    of: Drawn,
    grid: Grid,
    batch_size: int,
    device: torch.device,
    noise: tuple[float, str] = (0.0, "sde"),
) -> Draw:
    """How a model of `family` draws by the settings `of`, on their `grid`; `noise` of steps is its level and kind."""
    steps, (level, kind) = of.num_inference_steps, noise
    schedule = make_schedule(of.solver, steps, grid.shift, level, noise_kind=kind, sigmas=grid.sigmas, last=grid.last)
    return Draw(schedule.to(device), family.guidance(of.guidance_scale), batch_size)


def run_draws(
    config: Config, family: Family, device: torch.device, batch_size: int, eval_batch_size: int
) -> tuple[Draw, Draw]:
    """How a run of `config` draws images to learn from, and how it draws held-out ones."""
    rollout, evaluation = config.rollout, config.evaluation
    grids = [
        own_grid(family, rollout.shift, rollout.num_inference_steps, rollout.resolution),
        own_grid(family, rollout.shift, evaluation.num_inference_steps, config.evaluation_resolution),
    ]
    return (
        make_draw(family, rollout, grids[0], batch_size, device, (rollout.noise_level, rollout.noise_kind)),
        make_draw(family, evaluation, grids[1], eval_batch_size, device),
    )
