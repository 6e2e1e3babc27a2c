"""Which steps of a rollout have noise: all, or a window whose place is drawn anew for each rollout.

A step without noise is a step of the ODE. The window moves by a change of the schedule's coefficients in place: what
has recorded a rollout reads them where they are.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.config.options import Config, Rollout
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.seeds import stream_seed


def noisy_steps(rollout: Rollout, seed: int, number: int) -> range:
    """The steps of rollout `number` that have noise and can be learned from: the last step is none of them.

    Args:
        rollout: settings of a rollout with noise.
        seed: the run's.
        number: of the rollout, such as the iteration.
    """
    among = rollout.noise_among or max(rollout.num_inference_steps - 1, 1)
    if rollout.noise_steps is None:
        return range(among)
    rng = np.random.default_rng([stream_seed(seed, "noise window"), number])
    start = int(rng.integers(among - rollout.noise_steps + 1))
    return range(start, start + rollout.noise_steps)


@dataclass(frozen=True)
class NoiseWindow:
    """The window of a run's rollouts.

    Attributes:
        schedule: of the rollouts; its coefficients change.
        noisy: the same with noise in all steps.
        rollout, seed: see `noisy_steps`.
    """

    schedule: Schedule
    noisy: Schedule
    rollout: Rollout
    seed: int

    def place(self, number: int) -> None:
        """Gives noise to the steps of rollout `number`, and to no others."""
        schedule, noisy = self.schedule, self.noisy
        assert schedule.noise is not None and noisy.noise is not None
        inside = torch.zeros(schedule.steps, 1, dtype=torch.bool, device=schedule.sigmas.device)
        steps = noisy_steps(self.rollout, self.seed, number)
        inside[steps.start : steps.stop] = True
        schedule.coefficients.copy_(torch.where(inside, noisy.coefficients, _euler(schedule.sigmas)))
        schedule.noise.copy_(torch.where(inside, noisy.noise, 0.0))


@dataclass(frozen=True)
class RolloutNoise:
    """What is done with the noise of a run's rollouts.

    Attributes:
        keep_steps: whether every step of a rollout with noise is kept.
        share_initial: whether the images of a group start from the same noise.
        window: moves the noise of the steps; None if all of them have noise, or none.
    """

    keep_steps: bool
    share_initial: bool
    window: NoiseWindow | None


def noise_of(config: Config, schedule: Schedule, *, keep: bool) -> RolloutNoise:
    """By the settings, for rollouts by `schedule`; `keep`: whether steps with noise are kept."""
    rollout, window = config.rollout, None
    if rollout.noise_steps is not None or rollout.noise_among is not None:
        assert schedule.noise is not None
        noisy = replace(schedule, coefficients=schedule.coefficients.clone(), noise=schedule.noise.clone())
        window = NoiseWindow(schedule, noisy, rollout, config.seed)
    return RolloutNoise(keep, rollout.share_initial_noise, window)


def _euler(sigmas: Tensor) -> Tensor:
    """(S, 1) coefficients of the ODE's steps."""
    return (sigmas[1:] - sigmas[:-1])[:, None]
