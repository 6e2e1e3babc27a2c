"""Diffusion-KTO against its loss written out, and what must hold of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dgpo_kernels import philox_normal

from dgpo_fast.config.data_options import Data
from dgpo_fast.config.objective_options import KTO
from dgpo_fast.config.options import Config
from dgpo_fast.models.forward import predict
from dgpo_fast.objectives.kto import KTOObjective
from dgpo_fast.objectives.noise_levels import NoiseLevels
from dgpo_fast.seeds import stream_seed
from tests.denoising_case import assert_is_derivative, error_gradient, gradient, make_noised, per_sample
from tests.objective_case import GROUPS, SIZE, Case, make_config

LIKES = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])


def config_of(**kto: object) -> Config:
    data = Data(source="preferences", preferences="votes.jsonl")
    return replace(make_config(), objective="kto", data=data, kto=KTO(**{"timesteps": 3, **kto}))


def test_the_gradient_is_the_derivative() -> None:
    """With z held, which is a constant."""
    policy_v, noised = make_noised(LIKES)
    objective = KTOObjective(config_of(beta=3.0, disliked_weight=2.0))
    assert_is_derivative(lambda v: objective.losses(v, noised, torch.tensor(0.4))["loss"], policy_v)


def test_at_the_base_it_is_a_signed_denoising_loss() -> None:
    """There g = 0, z = 0 and the loss ½; its gradient is y·β/4·∇d."""
    _, noised = make_noised(LIKES)
    base_v = noised.predicted["ref_v"].clone().requires_grad_()
    objective = KTOObjective(config_of(beta=3.0))
    torch.testing.assert_close(objective.losses(base_v, noised)["loss"], torch.full((6,), 0.5, dtype=torch.float64))
    found = gradient(lambda v: objective.losses(v, noised)["loss"], base_v)
    torch.testing.assert_close(found, per_sample(LIKES.double()) * 3.0 / 4 * error_gradient(base_v, noised))


def test_turning_all_likes_around_turns_the_gradient_around() -> None:
    policy_v, noised = make_noised(LIKES)
    objective = KTOObjective(config_of(beta=3.0))
    turned = replace(noised, batch=replace(noised.batch, advantage=-noised.batch.advantage))
    one, other = (gradient(lambda v, of=of: objective.losses(v, of)["loss"], policy_v) for of in (noised, turned))
    torch.testing.assert_close(one, -other)


@pytest.mark.parametrize("micro_batch", [1, 5, GROUPS * SIZE])
def test_a_batch_learns_the_loss_written_out(micro_batch: int, random_pipeline: Path) -> None:
    """At each noise level z is that of the whole batch, whatever the micro-batch is."""
    beta, weight = 20.0, 0.5
    case = Case(random_pipeline, config_of(beta=beta, disliked_weight=weight))
    likes = torch.tensor([1.0, 1.0, -1.0]).repeat(4)
    case.batch = replace(case.batch, advantage=likes, group_size=1)
    number, losses = torch.arange(12), []
    for level in NoiseLevels("uniform", 3, seed=0).draw(7, case.batch.schedule, number):
        noise = philox_normal(
            tuple(case.batch.x0.shape[1:]), number, seed=stream_seed(0, "training noise"), draw=level.draw
        )
        sigma = per_sample(level.sigma)
        x_t, target = (1 - sigma) * case.batch.x0 + sigma * noise, noise - case.batch.x0
        with torch.no_grad():
            base = predict(case.models.base, x_t, level.timestep, case.batch.text)
        policy = predict(case.models.policy, x_t, level.timestep, case.batch.text)
        g = (base - target).square().mean((1, 2, 3)) - (policy - target).square().mean((1, 2, 3))
        z = (beta * g.detach()).mean().clamp(min=0)
        losses.append(torch.where(likes > 0, 1.0, weight) * (1 - torch.sigmoid(likes * (beta * g - z))))
    loss = torch.stack(losses).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
