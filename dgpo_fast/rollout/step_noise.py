"""Rollouts with noise: the noise of their steps, and each step's probability.

A step of such a rollout is x ← x + b·v + a·x + c·z (`Schedule.noise`), a Gaussian around its mean with the standard
deviation c. Flow-GRPO learns from these Gaussians; every objective may roll out with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi

import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from dgpo_fast.rollout.schedule import Schedule


@dataclass(frozen=True)
class Transitions:
    """Every step of a rollout of S steps with noise.

    Attributes:
        states: (S + 1, B, C, H, W) fp32, from the initial noise to x0.
        log_prob: (S, B) fp32 `gaussian_log_prob` of each step.
    """

    states: Tensor
    log_prob: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "Transitions":
        """The same for some of the samples."""
        return Transitions(self.states[:, rows], self.log_prob[:, rows])


class StepNoise:
    """Noise of a rollout's steps. It only depends on (seed, draw, step, sample), so that runs resume exactly.

    Args:
        samples: (B,) int64 indices of the samples.
        seed: of the noise's stream.
        draw: number of the rollout, such as the iteration; in a recorded rollout () int64 on the samples' device.
        keep: whether `transitions` is filled in.
    """

    def __init__(self, samples: Tensor, *, seed: int, draw: int | Tensor, keep: bool = False):
        self.samples, self.seed, self.draw, self.keep = samples, seed, draw, keep
        self.transitions: Transitions | None = None

    def start(self, noise: Tensor, steps: int) -> None:
        """Allocates memory for the steps that start from `noise` (B, C, H, W), if they are kept."""
        if self.keep:
            states = noise.new_empty(steps + 1, *noise.shape)
            states[0] = noise
            self.transitions = Transitions(states, noise.new_empty(steps, len(noise)))

    def add(self, x: Tensor, moved: Tensor, schedule: Schedule, step: int) -> Tensor:
        """The state after grid step `step`.

        Args:
            x: state before the step.
            moved: x + b·v.
            schedule: a grid with noise.
            step: index of the step.
        """
        assert schedule.noise is not None, "this rollout's schedule has no noise"
        gain, std = schedule.noise[step]
        draw = self.draw * schedule.steps + step
        z = philox_normal(tuple(x.shape[1:]), self.samples, seed=self.seed, draw=draw, device=x.device)
        after = moved + gain * x + std * z
        if self.transitions is not None:
            self.transitions.states[step + 1] = after
            self.transitions.log_prob[step] = gaussian_log_prob(z, std)
        return after


def joined(noises: Sequence[StepNoise | None]) -> Transitions | None:
    """The kept steps of rollouts one after another; None if none were kept."""
    kept = [noise.transitions for noise in noises if noise is not None and noise.transitions is not None]
    if not kept:
        return None
    return Transitions(torch.cat([part.states for part in kept], 1), torch.cat([part.log_prob for part in kept], 1))


def gaussian_log_prob(z: Tensor, std: Tensor) -> Tensor:
    """log N(std·z; 0, std²), the *mean* over each sample's elements, as Flow-GRPO's release has it.

    Args:
        z: (B, …) distance from the mean in standard deviations.
        std: () standard deviation.

    Returns:
        (B,).
    """
    return -0.5 * z.square().flatten(1).mean(1) - torch.log(std) - 0.5 * log(2 * pi)
