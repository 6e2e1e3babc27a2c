"""Reinforce Adjoint Matching against its loss written out, and what must hold of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.models.forward import predict
from dgpo_fast.objectives import ram as ram_module
from dgpo_fast.objectives.advantages import advantages
from dgpo_fast.objectives.denoising import step_from
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.noise_levels import NoiseLevels
from dgpo_fast.objectives.ram import RAMObjective
from dgpo_fast.seeds import stream_seed
from tests.denoising_case import (
    Held,
    assert_is_derivative,
    config_of,
    error_gradient,
    gradient,
    make_noised,
    per_sample,
)
from tests.objective_case import GROUPS, SIZE, Case

ADVANTAGE = torch.tensor([1.0, -0.8, 0.2, 0.5, -1.7, 0.7])


def loss_of(advantage: Tensor, **settings: object) -> tuple:
    """(the loss as a function of the policy's velocity, the policy's velocity, the samples)."""
    policy_v, noised = make_noised(advantage)
    objective = RAMObjective(config_of("ram", **settings))
    return lambda v: objective.losses(v, noised)["loss"], policy_v, noised


@pytest.mark.parametrize("residual", ["old", "policy"])
def test_the_gradient_is_the_derivative(residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the target held, which is a constant."""
    monkeypatch.setattr(ram_module, "step_from", Held(step_from, calls=1))
    loss, policy_v, _ = loss_of(ADVANTAGE, multiplier=3.0, residual=residual)
    assert_is_derivative(loss, policy_v)


def test_without_a_preference_it_pulls_to_the_base() -> None:
    """A = 0: mean (v − v_base)², 0 before the first step."""
    loss, policy_v, noised = loss_of(torch.zeros(6))
    torch.testing.assert_close(loss(policy_v), mean_square(policy_v - noised.predicted["ref_v"]))
    assert torch.equal(loss(noised.predicted["ref_v"]), torch.zeros(6, dtype=torch.float64))


def test_with_the_policys_own_residual_it_is_matching_and_a_pull() -> None:
    """v_b = v: the gradient is that of mean (v − v_base)² + m·A·mean (v − v*)²."""
    loss, policy_v, noised = loss_of(ADVANTAGE, multiplier=3.0, residual="policy")
    pull = gradient(lambda v: mean_square(v - noised.predicted["ref_v"]), policy_v)
    expected = pull + per_sample(3.0 * ADVANTAGE.double()) * error_gradient(policy_v, noised)
    torch.testing.assert_close(gradient(loss, policy_v), expected)


@pytest.mark.parametrize("residual", ["old", "policy"])
def test_only_the_product_of_multiplier_and_advantage_counts(residual: str) -> None:
    loss, policy_v, _ = loss_of(ADVANTAGE, multiplier=3.0, residual=residual)
    other, _, _ = loss_of(2 * ADVANTAGE, multiplier=1.5, residual=residual)
    torch.testing.assert_close(loss(policy_v), other(policy_v))
    torch.testing.assert_close(gradient(loss, policy_v), gradient(other, policy_v))


def test_its_advantages_by_hand() -> None:
    """Rewards (1, 3) and (4, 4): less their means (−1, 1, 0, 0), over the standard deviation of 1, 3, 4 and 4, 1.2247;
    that of the centred ones would give ±1.414."""
    found = advantages(np.array([[1.0, 3.0], [4.0, 4.0]]), Advantage(std="global", clamp=None))
    np.testing.assert_allclose(found, [-0.8165, 0.8165, 0, 0], atol=1e-4)
    large = advantages(np.array([[0.0] * 99 + [1.0]]), Advantage(std="group", clamp=None))
    assert float(large.max()) == pytest.approx(9.94, abs=0.01), "not clamped"


def written_out(case: Case) -> Tensor:
    """The loss over the whole batch, in plain tensor arithmetic."""
    batch, models, config = case.batch, case.models, case.config.ram
    models.load_behaviour(case.old)
    number, seed = torch.arange(GROUPS * SIZE), stream_seed(0, "training noise")
    losses = []
    for level in NoiseLevels("linear", 3, seed=0).draw(batch.iteration, batch.schedule, number):
        noise = philox_normal(tuple(batch.x0.shape[1:]), number, seed=seed, draw=level.draw)
        sigma = per_sample(level.sigma)
        x_t, target = (1 - sigma) * batch.x0 + sigma * noise, noise - batch.x0
        with torch.no_grad():
            old, ref = (predict(m, x_t, level.timestep, batch.text) for m in (models.behaviour, models.base))
        policy = predict(models.policy, x_t, level.timestep, batch.text)
        from_v = old if config.residual == "old" else policy.detach()
        wanted = ref + config.multiplier * per_sample(batch.advantage) * (target - from_v)
        losses.append((policy - wanted).square().mean((1, 2, 3)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("residual", ["old", "policy"])
def test_a_batch_learns_the_loss_written_out(residual: str, random_pipeline: Path) -> None:
    case = Case(random_pipeline, config_of("ram", multiplier=2.0, residual=residual))
    loss = written_out(case)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch=GROUPS * SIZE)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert ("old_distance" in metrics) is (residual == "old")
