"""The few-step sigma grids of the rollout, with the coefficients of each solver step.

Diffusers' schedulers define the grids, so an image drawn here is the image that a diffusers pipeline with that
scheduler draws. The steps are linear in the state and the predictions; `dgpo_kernels` computes each in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, expm1, inf, log, pi, sin, sqrt

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

START_ROUNDING = 1e-5
"""How far a grid's first sigma may be from 1 by rounding."""


@dataclass(frozen=True)
class Schedule:
    """One sigma grid of S steps.

    Attributes:
        solver: "dpmpp_2m" or "euler".
        sigmas: (S + 1,) fp32, falling to 0: x_t = (1 − σ)·x0 + σ·noise.
        timesteps: (S,) fp32, the transformer's input, in [0, 1000].
        coefficients: (S, 4) fp32 [σ, a, b, c] with x0 = x − σ·v and x ← a·x + b·x0 + c·x0_previous for "dpmpp_2m";
            (S, 1) fp32 [b] with x ← x + b·v for "euler", b = σ_next − σ if there is no noise.
        noise: None for an ODE; (S, 2) fp32 [a, c] of a stochastic rollout, whose steps are x ← x + b·v + a·x + c·z.
    """

    solver: str
    sigmas: Tensor
    timesteps: Tensor
    coefficients: Tensor
    noise: Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device) -> "Schedule":
        """The same grid on `device`."""
        tensors = (self.sigmas, self.timesteps, self.coefficients, self.noise)
        return Schedule(self.solver, *(None if t is None else t.to(device) for t in tensors))  # type: ignore[arg-type]


def make_scheduler(solver: str, shift: float) -> SchedulerMixin:
    """The diffusers scheduler whose grid and images `make_schedule` reproduces."""
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        flow_shift=shift,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )


def make_schedule(
    solver: str,
    num_inference_steps: int,
    shift: float,
    noise_level: float = 0.0,
    *,
    noise_kind: str = "sde",
    sigmas: Sequence[float] | None = None,
    last: float | None = None,
) -> Schedule:
    """The grid of `num_inference_steps` steps shifted by `shift`, for "dpmpp_2m" or "euler".

    A `noise_level` above 0 makes an "euler" rollout stochastic: `noise_kind` is one of NOISE_KINDS. `sigmas` and `last`
    are those of `models.family.Grid`.
    """
    if sigmas is not None:
        grid = _grid_of(sigmas, shift, last)
        timesteps = 1000 * grid[:-1].float()  # rounded as diffusers rounds them
    else:
        scheduler = make_scheduler(solver, shift)
        scheduler.set_timesteps(num_inference_steps)
        grid, timesteps = scheduler.sigmas, scheduler.timesteps
    falling = [float(sigma) for sigma in grid]
    noise = None
    if solver == "dpmpp_2m":
        if noise_level > 0:
            raise ValueError("noise_level: only the euler solver has a stochastic form")
        coefficients = _dpmpp_2m_coefficients(falling)
    elif noise_level > 0:
        coefficients, noise = NOISE_KINDS[noise_kind](falling, noise_level)
    else:
        coefficients = [[after - sigma] for sigma, after in pairwise(falling)]
    return Schedule(
        solver,
        grid.float().cpu(),
        timesteps.float().cpu(),
        torch.tensor(coefficients, dtype=torch.float32),
        None if noise is None else torch.tensor(noise, dtype=torch.float32),
    )


def _grid_of(sigmas: Sequence[float], shift: float, last: float | None) -> Tensor:
    """(n + 1,) float64: s(σ) of each, and 0, where s(σ) = k·σ / (1 + (k − 1)·σ) with the shift k.

    With `last`, the grid is stretched so that its last σ before 0 is that: 1 − (1 − s)·(1 − last) / (1 − s(σ_n)).
    """
    grid = shifted(torch.tensor(sigmas, dtype=torch.float64), shift)
    if last is not None and len(grid) > 1:
        grid = 1 - (1 - grid) * (1 - last) / (1 - grid[-1])
    return torch.cat([grid, grid.new_zeros(1)])


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """s(σ) = k·σ / (1 + (k − 1)·σ) with the shift k."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _stochastic_steps(sigmas: list[float], noise_level: float) -> tuple[list[list[float]], list[list[float]]]:
    """Euler–Maruyama steps of the SDE with the ODE's marginals (Flow-GRPO, arXiv 2505.05470, Eq. 9).

    With dt = σ_next − σ and s = noise_level·√(σ/(1 − σ)), a step is
    x·(1 + s²/(2σ)·dt) + v·(1 + s²·(1 − σ)/(2σ))·dt + s·√(−dt)·z. At σ = 1, where a grid begins (up to the rounding
    of its shift), the next sigma is used in s's denominator. The marginals are the ODE's in the limit of small steps.
    The first steps are never small: s is unbounded at σ = 1 (docs/objectives.md).
    """
    drift, noise = [], []
    for sigma, after in pairwise(sigmas):
        dt = after - sigma
        variance = noise_level**2 * sigma / (1.0 - (after if sigma > 1.0 - START_ROUNDING else sigma))
        drift.append([(1.0 + variance * (1.0 - sigma) / (2.0 * sigma)) * dt])
        noise.append([variance / (2.0 * sigma) * dt, sqrt(-variance * dt)])
    return drift, noise


def _constant_steps(sigmas: list[float], noise_level: float) -> tuple[list[list[float]], list[list[float]]]:
    """As `_stochastic_steps`, with s = noise_level at every σ (DanceGRPO, arXiv 2505.07818)."""
    drift, noise = [], []
    for sigma, after in pairwise(sigmas):
        dt, half = after - sigma, noise_level**2 / (2.0 * sigma)
        drift.append([(1.0 + half * (1.0 - sigma)) * dt])
        noise.append([half * dt, noise_level * sqrt(-dt)])
    return drift, noise


def _preserving_steps(sigmas: list[float], noise_level: float) -> tuple[list[list[float]], list[list[float]]]:
    """Steps whose states have exactly the grid's noise levels (Flow-CPS, arXiv 2509.05952).

    With c = σ_next·sin(noise_level·π/2) and q = √(σ_next² − c²), a step is (1 − σ_next)·x0 + q·ε + c·z, where
    x0 = x − σ·v and ε = x + (1 − σ)·v are predictions: fresh noise z replaces a share of the predicted one.
    """
    drift, noise = [], []
    for sigma, after in pairwise(sigmas):
        kept = after * cos(noise_level * pi / 2)
        drift.append([kept * (1.0 - sigma) - sigma * (1.0 - after)])
        noise.append([kept - after, after * sin(noise_level * pi / 2)])
    return drift, noise


NOISE_KINDS = {"sde": _stochastic_steps, "constant": _constant_steps, "cps": _preserving_steps}
"""Coefficients [b] and noise [a, c] of each step, from the grid and the noise level; see `Schedule`."""


def _dpmpp_2m_coefficients(sigmas: list[float]) -> list[list[float]]:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095), on alpha = 1 − σ: first order at both ends."""
    rows = []
    last = len(sigmas) - 2
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        if step == last:
            # σ_next = 0: h is infinite, and the step lands on x0.
            rows.append([sigma, 0.0, 1.0, 0.0])
            continue
        h = _log_snr(after) - _log_snr(sigma)
        gain = -(1.0 - after) * expm1(-h)
        second = 0.0 if step == 0 else 0.5 * gain * h / (_log_snr(sigma) - _log_snr(sigmas[step - 1]))
        rows.append([sigma, after / sigma, gain + second, -second])
    return rows


def _log_snr(sigma: float) -> float:
    return log(1.0 - sigma) - log(sigma) if sigma < 1.0 else -inf
