"""Draws of noise levels: their distributions, and that they are functions of counters."""

import math

import pytest
import torch

from dgpo_fast.config.objective_options import grid_steps
from dgpo_fast.objectives.noise_levels import NoiseLevels
from dgpo_fast.rollout.schedule import make_schedule

SCHEDULE = make_schedule("euler", 14, 3.0)
MANY = torch.arange(40_000)


def drawn(kind: str, count: int | None, iteration: int = 0, key: torch.Tensor = MANY) -> list[torch.Tensor]:
    """σ of each level of an iteration."""
    return [level.sigma for level in NoiseLevels(kind, count, 1, 3.0).draw(iteration, SCHEDULE, key)]  # type: ignore[arg-type]


def test_all_of_the_grid_but_the_last_step() -> None:
    sigmas = torch.stack(drawn("grid", None))
    assert torch.equal(sigmas.sort(descending=True).values, SCHEDULE.sigmas[:13])
    few = torch.stack(drawn("grid", 4))
    assert len(set(few.tolist())) == 4 and set(few.tolist()) <= set(SCHEDULE.sigmas[:13].tolist())


def test_one_step_from_each_part_of_the_grid() -> None:
    """Of 14 steps, 1 to 11 in six parts: the first one and the last tenth are left out, and each other one is drawn."""
    assert list(grid_steps("strata", 14)) == list(range(1, 12))
    seen = [set() for _ in range(6)]  # type: list[set[float]]
    for iteration in range(200):
        for part, sigma in zip(seen, drawn("strata", 6, iteration), strict=True):
            part.add(float(sigma))
    parts = [range(1, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 10), range(10, 12)]
    assert seen == [{float(SCHEDULE.sigmas[step]) for step in part} for part in parts]


def test_linear_levels_have_a_density_that_grows_as_sigma() -> None:
    """Mean 2/3, P(σ < ½) = ¼, independent from level to level."""
    first, second = drawn("linear", 2)
    for sigma in (first, second):
        assert float(sigma.mean()) == pytest.approx(2 / 3, abs=0.005)
        assert float((sigma < 0.5).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02


def test_uniform_levels_lie_in_a_part_each() -> None:
    sigmas = drawn("uniform", 4)
    for slot, sigma in enumerate(sigmas):
        assert 0.2 + 0.2 * slot <= float(sigma.min()) and float(sigma.max()) <= 0.2 + 0.2 * (slot + 1) + 1e-6
    assert float(torch.cat(sigmas).mean()) == pytest.approx(0.6, abs=0.005)


def test_uniform_levels_begin_where_they_are_told() -> None:
    levels = NoiseLevels("uniform", 4, 1, lowest=0.0).draw(0, SCHEDULE, MANY)
    for slot, level in enumerate(levels):
        assert 0.25 * slot <= float(level.sigma.min()) and float(level.sigma.max()) <= 0.25 * (slot + 1) + 1e-6


def test_the_shift_of_logit_normal_levels_is_towards_noise() -> None:
    """Median 3·½/(1 + 2·½) = ¾ with the shift 3, and not ¼."""
    assert float(drawn("logit_normal", 1)[0].median()) == pytest.approx(0.75, abs=0.01)
    low, high = drawn("logit_normal", 2)
    assert float(low.max()) <= 0.75 + 1e-6 and float(high.min()) >= 0.75 - 1e-6
    unshifted = torch.logit(high / (3 - 2 * high))
    assert float(unshifted.mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.02), "half of a normal"


@pytest.mark.parametrize("kind", ["grid", "strata", "uniform", "linear", "logit_normal"])
def test_levels_are_a_function_of_iteration_and_key(kind: str) -> None:
    """The same on a process that holds a part of the samples, and others in another iteration."""
    whole, part = (torch.stack([s.expand(n) for s in drawn(kind, 4, 7, MANY[:n])]) for n in (50, 20))
    torch.testing.assert_close(whole[:, :20], part)  # a processor rounds the rest of a vector in another way
    assert not torch.equal(torch.stack([s.expand(50) for s in drawn(kind, 4, 8, MANY[:50])]), whole)
    numbers = {
        level.draw
        for iteration in (7, 8)
        for level in NoiseLevels(kind, 4, 1, 3.0).draw(iteration, SCHEDULE, MANY[:2])  # type: ignore[arg-type]
    }
    assert len(numbers) == 8, "each level has noise of its own"
