"""Centered Reward Distillation against its loss written out, and what must hold of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dgpo_kernels import philox_normal
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dgpo_fast.models.forward import predict
from dgpo_fast.objectives import crd as crd_module
from dgpo_fast.objectives.crd import OF_WHOLE_GROUPS, CRDObjective, group_weights, implicit_reward, in_groups
from dgpo_fast.objectives.denoising import Noised, mean_abs, preference
from dgpo_fast.objectives.levels import draw_training_steps
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

ADVANTAGE = torch.tensor([1.0, -1.2, 0.2, 1.0, -1.7, 0.7])
"""Of two groups of three, whose sums are 0."""
NO_KL = {"kl_weight": 0.0, "kl_weight_worst": 0.0}
KINDS = ("mse", "bce")


def loss_of(advantage: Tensor, *, at_old: bool = False, **settings: object) -> tuple:
    """(the loss as a function of the policy's velocity, the policy's velocity, the samples)."""
    policy_v, noised = make_noised(advantage, at_old=at_old)
    objective = CRDObjective(config_of("crd", **settings))
    noised = with_wanted(noised, preference(noised.batch.advantage, 5.0))
    return lambda v: objective.losses(v, noised)["loss"], policy_v, noised


def with_wanted(noised: Noised, share: Tensor) -> Noised:
    wanted = share - share.reshape(-1, 3).mean(1).repeat_interleave(3)
    more = {"wanted": wanted[:, None], "weight": torch.ones_like(wanted)[:, None]}
    return replace(noised, predicted={**noised.predicted, **more})


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_derivative(kind: str, adaptive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights of the errors held, and the mean of each group, which are constants."""
    monkeypatch.setattr(crd_module, "mean_abs", Held(mean_abs, calls=2))
    centres = Held(OF_WHOLE_GROUPS, calls=1)
    policy_v, noised = make_noised(ADVANTAGE)
    objective = CRDObjective(config_of("crd", loss=kind, adaptive_weight=adaptive, beta=2.0))
    noised = with_wanted(noised, preference(noised.batch.advantage, 5.0))
    assert_is_derivative(lambda v: objective.losses(v, noised, centres=centres)["loss"], policy_v)


@pytest.mark.parametrize("beta", [0.2, 3.0])
def test_the_first_gradient_is_a_weighted_regression(beta: float) -> None:
    """At θ_old: A times the gradient of mean (v − v*)², twice DGPO's, whatever β is; over mean |v − v*| if errors are
    weighted."""
    for adaptive in (False, True):
        settings = {"adaptive_weight": adaptive, "beta": beta, **NO_KL}
        loss, policy_v, noised = loss_of(ADVANTAGE, at_old=True, **settings)
        scale = ADVANTAGE / (mean_abs(policy_v - noised.target_v) if adaptive else 1.0)
        torch.testing.assert_close(gradient(loss, policy_v), per_sample(scale) * error_gradient(policy_v, noised))


def test_equal_rewards_pull_a_group_together() -> None:
    """At θ_old there is nothing to do. Elsewhere, the implicit rewards of a group become alike; DGPO does nothing."""
    loss, policy_v, _ = loss_of(torch.zeros(6), at_old=True, **NO_KL)
    assert loss(policy_v).abs().max() == 0 == gradient(loss, policy_v).abs().max()
    loss, policy_v, noised = loss_of(torch.zeros(6), **NO_KL)
    config, rate = config_of("crd").crd, 0.05

    def spread(v: Tensor) -> Tensor:
        return implicit_reward(v, noised, config).reshape(2, 3).var(1)

    step = gradient(loss, policy_v)
    assert step.abs().max() > 0
    assert (spread(policy_v - rate * step) < spread(policy_v)).all()


def test_a_constant_added_to_a_groups_rewards_changes_nothing() -> None:
    """Neither to the real ones nor to the implicit ones: what is unknown of a prompt cancels."""
    policy_v, noised = make_noised(ADVANTAGE)
    objective = CRDObjective(config_of("crd", **NO_KL))
    share, constant = preference(noised.batch.advantage, 5.0), torch.tensor([0.3, -0.1]).repeat_interleave(3)
    plain, moved = with_wanted(noised, share), with_wanted(noised, share + constant)
    expected = objective.losses(policy_v, plain)["loss"]
    torch.testing.assert_close(objective.losses(policy_v, moved)["loss"], expected)
    both = [reward - in_groups(reward, noised) for reward in (share, share + constant)]
    torch.testing.assert_close(*both)


def test_the_mean_may_be_a_constant() -> None:
    """The residuals of a group sum to 0, so that a gradient through the mean of the implicit rewards adds nothing."""
    loss, policy_v, noised = loss_of(ADVANTAGE, beta=2.0, **NO_KL)
    config = config_of("crd", beta=2.0).crd

    def with_gradient(v: Tensor) -> Tensor:
        reward = implicit_reward(v, noised, config)
        return 5.0 / 2.0 * (2.0 * (reward - in_groups(reward, noised)) - noised.predicted["wanted"][:, 0]).square()

    torch.testing.assert_close(with_gradient(policy_v), loss(policy_v))
    torch.testing.assert_close(gradient(with_gradient, policy_v), gradient(loss, policy_v))


def test_the_best_images_are_held_most() -> None:
    """kl_weight_worst for A = −5, kl_weight for A = 5, and their mean for A = 0."""
    advantage = torch.tensor([-5.0, 0.0, 5.0])
    settings = {"beta": 1.0, "kl_weight": 0.1, "kl_weight_worst": 1e-4}
    loss, policy_v, noised = loss_of(advantage, **settings)
    without, _, _ = loss_of(advantage, beta=1.0, **NO_KL)
    kl = (policy_v - noised.predicted["ref_v"]).square().mean((1, 2, 3))
    expected = torch.tensor([1e-4, 0.05005, 0.1], dtype=torch.float64) * kl
    torch.testing.assert_close(loss(policy_v) - without(policy_v), expected)


def test_weights_of_a_groups_means_by_hand() -> None:
    """None: all alike. T: softmax (±r/T) times G. 0: the positive ones, and the negative ones; without any, all."""
    advantage = torch.tensor([[2.0, 0.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    reward = preference(advantage, 5.0)
    assert torch.equal(group_weights(advantage, reward, None), torch.ones(2, 4, 1, dtype=torch.float64))
    hard = group_weights(advantage, reward, 0.0)
    assert hard[0].tolist() == [[4.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 2.0]] and bool((hard[1] == 1).all())
    soft = group_weights(advantage, reward, 0.1)
    e = [np.e**x for x in (2.0, 0.0, -1.0, -1.0)]
    assert soft[0, :, 0].tolist() == pytest.approx([4 * x / sum(e) for x in e])
    assert soft[0, :, 1].tolist() == pytest.approx([4 / x / sum(1 / y for y in e) for x in e])
    torch.testing.assert_close(group_weights(advantage, reward, 1e9), torch.ones(2, 4, 2, dtype=torch.float64))


def with_weights(noised: Noised, temperature: float) -> Noised:
    advantage = noised.batch.advantage.reshape(2, 3)
    share = preference(advantage, 5.0)
    weight = group_weights(advantage, share, temperature)
    wanted = share[..., None] - (weight * share[..., None]).mean(1, keepdim=True)
    more = {"wanted": wanted.flatten(0, 1), "weight": weight.flatten(0, 1)}
    return replace(noised, predicted={**noised.predicted, **more})


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_two_centres_are_half_of_the_loss_each(temperature: float) -> None:
    """Written out for a group; and a high temperature is the plain mean."""
    policy_v, noised = make_noised(ADVANTAGE)
    objective = CRDObjective(config_of("crd", beta=2.0, temperature=temperature, **NO_KL))
    noised = with_weights(noised, temperature)
    reward, share = implicit_reward(policy_v, noised, objective.config), preference(noised.batch.advantage, 5.0)
    expected = 0
    for kind in range(2):
        weight = noised.predicted["weight"][:, kind]
        means = [(weight * of).reshape(2, 3).sum(1).repeat_interleave(3) / 3 for of in (reward, share)]
        expected = expected + 5.0 / 2.0 * 0.5 * (2.0 * (reward - means[0]) - (share - means[1])).square()
    torch.testing.assert_close(objective.losses(policy_v, noised)["loss"], expected)
    plain, policy_v, _ = loss_of(ADVANTAGE, beta=2.0, **NO_KL)
    hot = objective.losses(policy_v, with_weights(noised, 1e9))["loss"]
    torch.testing.assert_close(hot, plain(policy_v))


def test_a_constant_cancels_at_any_temperature() -> None:
    """What is unknown of a prompt: weights have the mean 1, and the two means move by it."""
    policy_v, noised = make_noised(ADVANTAGE)
    objective = CRDObjective(config_of("crd", temperature=0.1, **NO_KL))
    noised = with_weights(noised, 0.1)
    expected = objective.losses(policy_v, noised)["loss"]

    def moved(reward: Tensor, noised: Noised) -> Tensor:
        return OF_WHOLE_GROUPS(reward + 0.3, noised) - 0.3

    torch.testing.assert_close(objective.losses(policy_v, noised, centres=moved)["loss"], expected)


def written_out(case: Case) -> Tensor:
    """The loss over the whole batch, in plain tensor arithmetic."""
    batch, models, config = case.batch, case.models, case.config.crd
    models.load_behaviour(case.old)
    number, seed = torch.arange(GROUPS * SIZE), stream_seed(0, "training noise")
    share = (batch.advantage / 10 + 0.5).clamp(0, 1)

    def centred(values: Tensor) -> Tensor:
        by_group = values.reshape(GROUPS, SIZE)
        return (by_group - by_group.mean(1, keepdim=True).detach()).flatten()

    losses = []
    for slot, step in enumerate(draw_training_steps(batch.iteration, count=3, among=5, seed=0)):
        sigma, timestep = batch.schedule.sigmas[step], batch.schedule.timesteps[step]
        noise = philox_normal(tuple(batch.x0.shape[1:]), number, seed=seed, draw=batch.iteration * 3 + slot)
        x_t, target = (1 - sigma) * batch.x0 + sigma * noise, noise - batch.x0
        with torch.no_grad():
            old = predict(models.behaviour, x_t, timestep, batch.text)
            conditional, negative = (
                predict(models.base, x_t, timestep, t) for t in (batch.text, batch.text.negative())
            )
            ref = negative + config.kl_guidance_scale * (conditional - negative)
        policy = predict(models.policy, x_t, timestep, batch.text)

        def error(v: Tensor, target: Tensor = target) -> Tensor:
            weight = (v - target).detach().abs().mean((1, 2, 3)) if config.adaptive_weight else 1.0
            return (v - target).square().mean((1, 2, 3)) / weight

        reward, wanted = config.beta * centred(error(old) - error(policy)), centred(share)
        if config.loss == "mse":
            loss = (reward - wanted).square()
        else:
            loss = binary_cross_entropy_with_logits(reward, torch.sigmoid(wanted), reduction="none")
        kl_weight = config.kl_weight_worst + share * (config.kl_weight - config.kl_weight_worst)
        losses.append(5 / config.beta * loss + kl_weight * (policy - ref).square().mean((1, 2, 3)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_batch_learns_the_loss_written_out(kind: str, guidance: float, adaptive: bool, random_pipeline: Path) -> None:
    config = config_of("crd", loss=kind, kl_guidance_scale=guidance, beta=2.0, adaptive_weight=adaptive)
    case = Case(random_pipeline, config)
    loss = written_out(case)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch=GROUPS * SIZE)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
