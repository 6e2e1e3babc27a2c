"""Rollouts with noise: the SDE's steps, their marginals and their densities."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from dgpo_kernels import guided_euler_step, philox_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.distributions import Normal

from dgpo_fast.models.family import Guidance
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import sample_latents
from dgpo_fast.rollout.schedule import Schedule, _stochastic_steps, make_schedule
from dgpo_fast.rollout.step_noise import StepNoise, gaussian_log_prob
from tests.sd3 import stand_in


def test_stochastic_steps_by_hand() -> None:
    """σ = 1 → ½ → ¼ with noise level 0.7: s² = 0.49·1/(1 − ½) and 0.49·½/½; dt = −½ and −¼."""
    drift, noise = _stochastic_steps([1.0, 0.5, 0.25], 0.7)
    assert drift[0] == pytest.approx([-0.5]) and noise[0] == pytest.approx([0.98 / 2 * -0.5, math.sqrt(0.98 * 0.5)])
    assert drift[1] == pytest.approx([(1 + 0.49 * 0.5 / 1.0) * -0.25])
    assert noise[1] == pytest.approx([0.49 / 1.0 * -0.25, 0.7 * math.sqrt(0.25)])


def gaussian_velocity(x: Any, sigma: Any, mean: float = 0.6, std: float = 0.3) -> Any:
    """E[ε − x0 | x_t = x] for x0 ~ N(mean, std²), of tensors or of numbers."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    residual = x - (1 - sigma) * mean
    return sigma / variance * residual - (mean + (1 - sigma) * std**2 / variance * residual)


def roll_out(schedule: Schedule, noise: torch.Tensor, step_noise: StepNoise | None) -> torch.Tensor:
    """`sample_latents` on the Gaussian's own velocity."""

    class Transformer:
        def __call__(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
            return (gaussian_velocity(hidden_states, timestep.reshape(-1, 1, 1, 1) / 1000),)

    text = TextEmbeds.of_samples({"prompt": torch.zeros(len(noise), 1, 1), "pooled": torch.zeros(len(noise), 1)})
    draw = Draw(schedule, guidance=Guidance(1.0), batch_size=len(noise))
    return sample_latents(stand_in(Transformer()), noise, text, draw, step_noise=step_noise)  # type: ignore[arg-type]


def start(samples: int) -> torch.Tensor:
    return philox_normal((4, 100, 100), torch.arange(samples), seed=3, draw=0)


def test_no_noise_is_the_ode() -> None:
    """The stochastic steps at noise level 0 give the ODE's images to the last bit."""
    ode, noise = make_schedule("euler", 6, 3.0), start(2)
    drift, spread = _stochastic_steps([float(sigma) for sigma in ode.sigmas], 0.0)
    sde = replace(ode, coefficients=torch.tensor(drift), noise=torch.tensor(spread))
    step_noise = StepNoise(torch.arange(2), seed=1, draw=0)
    assert torch.equal(roll_out(sde, noise, step_noise), roll_out(ode, noise, None))


def moments(steps: int, shift: float, noise_level: float, start: float = 1.0) -> np.ndarray:
    """σ, mean and variance of the states of a rollout, (S, 3) float64, exactly: every step is affine in x.

    It begins at the first σ ≤ `start` of the grid of `steps` steps, with the ODE's mean and variance there.
    """
    grid = [float(sigma) for sigma in make_schedule("euler", steps, shift).sigmas]
    grid = grid[next(index for index, sigma in enumerate(grid) if sigma <= start) :]
    mean, variance = (float(of) for of in exact_moments(np.float64(grid[0])))
    states = [(grid[0], mean, variance)]
    steps_of = zip(pairwise(grid), *_stochastic_steps(grid, noise_level), strict=True)
    for (sigma, after), (drift,), (gain, std) in steps_of:
        offset, both = (gaussian_velocity(x, sigma) for x in (0.0, 1.0))
        slope = 1 + gain + drift * (both - offset)
        mean, variance = slope * mean + drift * offset, slope**2 * variance + std**2
        states.append((after, mean, variance))
    return np.array(states)


def exact_moments(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of x_t for x0 ~ N(0.6, 0.3²)."""
    return (1 - sigma) * 0.6, (1 - sigma) ** 2 * 0.3**2 + sigma**2


def variance_error(states: np.ndarray) -> np.ndarray:
    return states[:, 2] / exact_moments(states[:, 0])[1] - 1


@pytest.mark.parametrize("start", [0.99, 0.9, 0.5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_marginals_are_the_odes(noise_level: float, shift: float, start: float) -> None:
    """On a Gaussian N(m, s²), from the exact state at some σ < 1 on, every state down to σ = 0 has the mean (1 − σ)·m
    and the variance (1 − σ)²·s² + σ² of the ODE's, within 0.5 %. The error falls as 1 / steps, but for the last step: a
    shifted grid of diffusers' has its last σ > 0 at the same place, however many steps there are."""
    worst = []
    for steps in (1000, 4000):
        states = moments(steps, shift, noise_level, start)
        assert states[-1, 0] == 0
        error = np.abs(variance_error(states))
        worst.append(error[:-1].max())
        assert np.abs(states[:, 1] - exact_moments(states[:, 0])[0]).max() < 0.005 * 0.6
    assert error.max() < 0.005 and worst[1] == pytest.approx(worst[0] / 4, rel=0.1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_the_first_steps_are_not_small(noise_level: float, shift: float) -> None:
    """The released SDE has s² = a²·σ/(1 − σ), without bound at σ = 1: from there the first step, whose s² is
    a²·1/(1 − σ_next), and the second both add noise of variance a², however short they are, and take a²/2 of x. The
    first state has the variance (1 − a²/2)² + a² = 1 + a⁴/4, not 1, and the second (1 − a²/2)²·(1 + a⁴/4) + a²: at
    a = 0.7, 6.0 % and 9.4 % too much, which is the worst of all. Farther on the error falls, and at any one σ < 1
    slowly, as steps^(−a²), with more steps."""
    a2, late = noise_level**2, []
    first = 1 + a2**2 / 4
    for steps in (4000, 16000):
        states = moments(steps, shift, noise_level)
        error = variance_error(states)
        assert error[0] == pytest.approx(0, abs=1e-6)
        assert error[1] == pytest.approx(first - 1, rel=0.02)
        assert error[2] == pytest.approx((1 - a2 / 2) ** 2 * first + a2 - 1, rel=0.02)
        late.append(error[np.argmax(states[:, 0] < 0.5)])
    assert 0 < late[1] < late[0] < error[2] / 1.3
    assert late[1] / late[0] == pytest.approx(4**-a2, rel=0.07)
    if noise_level == 0.7:
        assert error[1] == pytest.approx(0.060, abs=1e-3) and error.max() == error[2] == pytest.approx(0.094, abs=1e-3)


@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_rollouts_make_these_steps(noise_level: float) -> None:
    """The states of 40,000 elements have the mean and the variance that the recursion has, at every step of few."""
    schedule = make_schedule("euler", 10, 3.0, noise_level)
    noise = StepNoise(torch.arange(4), seed=1, draw=0, keep=True)
    roll_out(schedule, start(4), noise)
    assert noise.transitions is not None
    for state, (_, mean, variance) in zip(noise.transitions.states, moments(10, 3.0, noise_level), strict=True):
        assert float(state.mean()) == pytest.approx(mean, abs=0.02)
        assert float(state.var()) == pytest.approx(variance, rel=0.03)


def test_noise_is_a_function_of_seed_draw_step_and_sample() -> None:
    schedule, noise = make_schedule("euler", 4, 3.0, 0.7), start(4)
    whole = roll_out(schedule, noise, StepNoise(torch.arange(4), seed=1, draw=5))
    part = roll_out(schedule, noise[2:], StepNoise(torch.arange(2, 4), seed=1, draw=5))
    assert torch.equal(whole[2:], part), "another batch, the same images"
    for other in (StepNoise(torch.arange(4), seed=2, draw=5), StepNoise(torch.arange(4), seed=1, draw=6)):
        assert not torch.equal(whole, roll_out(schedule, noise, other))
    kept = StepNoise(torch.arange(4), seed=1, draw=5, keep=True)
    roll_out(schedule, noise, kept)
    states = kept.transitions.states
    moves = [(states[step + 1] - moved(schedule, step, states[step])) / schedule.noise[step, 1] for step in range(4)]
    assert all(abs(float(z.std()) - 1) < 0.02 for z in moves)
    assert abs(float((moves[0] * moves[1]).mean())) < 0.02, "every step has noise of its own"


def moved(schedule: Schedule, step: int, x: torch.Tensor) -> torch.Tensor:
    """The mean of a step."""
    v = gaussian_velocity(x, schedule.timesteps[step] / 1000)
    after = guided_euler_step(x, v, None, guidance_scale=1.0, coefficients=schedule.coefficients[step])
    return after + schedule.noise[step, 0] * x


def test_only_euler_takes_noise() -> None:
    with pytest.raises(ValueError, match="only the euler solver has a stochastic form"):
        make_schedule("dpmpp_2m", 4, 3.0, 0.7)


def test_log_prob_by_hand() -> None:
    """Two elements 1 and −2 standard deviations off, std ½: −(1 + 4)/4 − ln ½ − ½·ln 2π, the mean over the elements."""
    found = gaussian_log_prob(torch.tensor([[1.0, -2.0]]), torch.tensor(0.5))
    assert float(found) == pytest.approx(-1.25 + 0.6931472 - 0.9189385)


@settings(deadline=None, max_examples=40)
@given(arrays(np.float32, (3, 2, 2), elements=st.floats(-4, 4, width=32)), st.floats(0.01, 3))
def test_log_prob_is_that_of_torch_distributions(z: np.ndarray, std: float) -> None:
    x = torch.from_numpy(z)
    expected = Normal(1.0, std).log_prob(1.0 + std * x.double()).flatten(1).mean(1)
    assert torch.allclose(gaussian_log_prob(x, torch.tensor(std)).double(), expected, rtol=1e-5, atol=1e-5)
