"""The rollout's solvers are diffusers' solvers."""

import numpy as np
import pytest
import torch
from dgpo_kernels import guided_dpmpp_2m_step, guided_euler_step
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.rollout.schedule import make_schedule, make_scheduler


def solve(solver: str, steps: int, shift: float, x: torch.Tensor) -> torch.Tensor:
    schedule, previous = make_schedule(solver, steps, shift), None
    for timestep, numbers in zip(schedule.timesteps, schedule.coefficients, strict=True):
        v = velocity(x, timestep)
        if solver == "euler":
            x = guided_euler_step(x, v, None, guidance_scale=1.0, coefficients=numbers)
        else:
            x, previous = guided_dpmpp_2m_step(x, v, None, previous, guidance_scale=1.0, coefficients=numbers)
    return x


def velocity(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A smooth nonlinear field of the size of a real model's."""
    return torch.sin(x) + 0.5 * x * timestep / 1000


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["euler", "dpmpp_2m"]), st.integers(1, 50), st.floats(1, 6), st.integers(0, 99))
def test_same_picture_as_diffusers(solver: str, steps: int, shift: float, seed: int) -> None:
    """The final state agrees with diffusers' scheduler to 1e-5 over 1–50 steps and shifts of 1–6."""
    start = torch.randn(2, 4, 5, 5, generator=torch.manual_seed(seed))
    scheduler = make_scheduler(solver, shift)
    scheduler.set_timesteps(steps)
    theirs = start
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(velocity(theirs, timestep.float()), timestep, theirs).prev_sample
    assert torch.allclose(solve(solver, steps, shift, start), theirs, rtol=1e-5, atol=1e-5)


def test_exact_solution_of_a_gaussian() -> None:
    """Data of standard deviation ½ is half the noise: Euler converges to it and DPM-Solver++(2M) is closer."""
    noise = torch.randn(1, 1, 8, 8, generator=torch.manual_seed(0))

    def error(solver: str, steps: int) -> float:
        schedule, x, previous = make_schedule(solver, steps, 1.0), noise, None
        for sigma, numbers in zip(schedule.sigmas, schedule.coefficients, strict=False):
            v = (sigma - 0.25 * (1 - sigma)) * x / (0.25 * (1 - sigma) ** 2 + sigma**2)
            if solver == "euler":
                x = guided_euler_step(x, v, None, guidance_scale=1.0, coefficients=numbers)
            else:
                x, previous = guided_dpmpp_2m_step(x, v, None, previous, guidance_scale=1.0, coefficients=numbers)
        return abs(float((x / noise).mean()) - 0.5)

    assert error("euler", 40) < error("euler", 10) / 3
    assert error("dpmpp_2m", 10) < error("euler", 10) / 3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_falls_from_noise_to_data(shift: float) -> None:
    for solver in ("euler", "dpmpp_2m"):
        schedule = make_schedule(solver, 10, shift)
        assert schedule.sigmas.diff().lt(0).all()
        assert schedule.sigmas[0] > 0.99 and schedule.sigmas[-1] == 0
        assert torch.allclose(schedule.timesteps / 1000, schedule.sigmas[:-1], atol=1e-3)


def test_noise_of_the_first_step_is_bounded_at_any_shift() -> None:
    """The first sigma is 1 but for rounding, on either side of it, where s = a·√(σ/(1 − σ)) would be anything."""
    for shift in np.arange(0.5, 12, 0.01):
        schedule = make_schedule("euler", 10, float(shift), noise_level=0.7)
        assert schedule.noise is not None
        sigma, after = schedule.sigmas[:2].double()
        expected = 0.7 * ((sigma - after) * sigma / (1 - after)).sqrt()
        assert schedule.noise[0, 1] == pytest.approx(float(expected), rel=1e-4), shift
