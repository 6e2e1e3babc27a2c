"""One row for a whole group at the first noise level (`engine.share_first_level`).

A group shares prompt, timestep and noise. At σ = 1 its inputs x_t = (1 − σ)·x0 + σ·ε are one tensor, and only the
targets ε − x0 differ. Each transformer then needs one row a group, and the backward pass one row with the sum of the
group's gradients. If σ is a little less than 1, the shared input has the group's mean x0, or the mean of what a process
holds of the group; the samples' own inputs differ from it by (1 − σ)·(x0 − mean).
"""

from functools import cache

import torch

from dgpo_fast.config.options import Config
from dgpo_fast.objectives.levels import training_sigmas
from dgpo_fast.rollout.schedule import make_schedule


def first_sigma(config: Config) -> float | None:
    """σ of the training latents at the first step of the rollout's grid; None if its shift is still to be read."""
    rollout = config.rollout
    if rollout.shift is None:
        return None
    return _first_sigma(rollout.solver, rollout.num_inference_steps, rollout.shift, config.dgpo.training_sigma)


@cache
def _first_sigma(solver: str, num_inference_steps: int, shift: float, training_sigma: str) -> float:
    return float(training_sigmas(make_schedule(solver, num_inference_steps, shift), training_sigma)[0])


def input_error(sigma: float) -> float:
    """How far a group's inputs lie from the shared one, relative to it: |1 − σ|, if x0 is about as large as ε."""
    return abs(1.0 - sigma)


def largest_error(dtype: torch.dtype) -> float:
    """The largest `input_error` that "auto" shares: a quarter of the dtype's eps, and half of what rounding an input
    does at most. In fp32, none but 0: σ is an fp32 number."""
    return torch.finfo(dtype).eps / 4


def is_shared(setting: str, sigma: float | None, dtype: torch.dtype) -> bool:
    """Whether a group's samples share one row.

    Args:
        setting: "auto", "on" or "off".
        sigma: of the level; None if the objective has no such level.
        dtype: of the forwards.
    """
    if sigma is None or setting == "off":
        return False
    return setting == "on" or input_error(sigma) < largest_error(dtype)
