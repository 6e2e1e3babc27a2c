"""DiffusionNFT against its released form, and what must hold of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from dgpo_fast.config.objective_options import NFT
from dgpo_fast.models.forward import predict
from dgpo_fast.objectives import nft as nft_module
from dgpo_fast.objectives.denoising import mean_abs, preference, step_from
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.levels import draw_training_steps
from dgpo_fast.objectives.nft import nft_loss
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

ADVANTAGE = torch.tensor([1.0, -2.0, 1.0, 0.5, 4.0, -4.5])
BOUND = 5.0


def loss_of(advantage: Tensor, *, at_old: bool = False, **settings: object) -> tuple:
    """(the loss as a function of the policy's velocity, the policy's velocity, the samples)."""
    policy_v, noised = make_noised(advantage, at_old=at_old)
    config, old_v = NFT(**settings), noised.predicted["old_v"]  # type: ignore[arg-type]
    return lambda v: nft_loss(v, old_v, noised, config, BOUND), policy_v, noised


def released(policy_v: Tensor, old_v: Tensor, x0: Tensor, x_t: Tensor, sigma: Tensor, share: Tensor, beta: float):
    """The loss in the release's own form: two predictions of x0, each error divided by its own mean."""
    sigma, losses = per_sample(sigma), []
    for v in (beta * policy_v + (1 - beta) * old_v, (1 + beta) * old_v - beta * policy_v):
        difference = x_t - sigma * v - x0
        weight = difference.detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
        losses.append((difference.square() / weight).mean((1, 2, 3)) / beta)
    return BOUND * (share * losses[0] + (1 - share) * losses[1])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss_is_the_released_one(beta: float) -> None:
    loss, policy_v, noised = loss_of(ADVANTAGE, beta=beta)
    x0, sigma = noised.batch.x0, per_sample(noised.sigma)
    x_t = (1 - sigma) * x0 + sigma * (noised.target_v + x0)
    share = (ADVANTAGE / 10 + 0.5).clamp(0, 1).double()
    expected = released(policy_v, noised.predicted["old_v"], x0, x_t, noised.sigma, share, beta)
    torch.testing.assert_close(loss(policy_v), expected)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_is_the_derivative(adaptive: bool, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights of the errors held, which are constants."""
    monkeypatch.setattr(nft_module, "mean_abs", Held(mean_abs, calls=2))
    loss, policy_v, _ = loss_of(ADVANTAGE, beta=beta, adaptive_weight=adaptive)
    assert_is_derivative(loss, policy_v)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_first_gradient_is_a_weighted_regression(beta: float) -> None:
    """At θ_old: A·σ/mean |v − v*| times the gradient of mean (v − v*)², whatever β is."""
    loss, policy_v, noised = loss_of(ADVANTAGE, at_old=True, beta=beta)
    scale = ADVANTAGE * noised.sigma / mean_abs(policy_v - noised.target_v)
    torch.testing.assert_close(gradient(loss, policy_v), per_sample(scale) * error_gradient(policy_v, noised))
    opposite, policy_v, _ = loss_of(-ADVANTAGE, at_old=True, beta=beta)
    torch.testing.assert_close(gradient(opposite, policy_v), -gradient(loss, policy_v))


def test_equal_rewards_only_pull_to_old() -> None:
    """r = ½: no gradient at θ_old; unweighted, the loss is 5·σ²·(mean (v_old − v*)²/β + β·mean (v − v_old)²)."""
    zero = torch.zeros(6)
    loss, policy_v, _ = loss_of(zero, at_old=True)
    assert gradient(loss, policy_v).abs().max() < 1e-15
    loss, policy_v, noised = loss_of(zero, beta=0.3, adaptive_weight=False)
    old_v = noised.predicted["old_v"]
    error, distance = mean_square(old_v - noised.target_v), mean_square(policy_v - old_v)
    torch.testing.assert_close(loss(policy_v), 5 * noised.sigma**2 * (error / 0.3 + 0.3 * distance))


def test_the_best_image_is_regressed_to() -> None:
    """r = 1, β = 1, unweighted: 5·mean (x̂0 − x0)²."""
    loss, policy_v, noised = loss_of(torch.full((6,), 7.0), adaptive_weight=False)
    x0, sigma = noised.batch.x0, per_sample(noised.sigma)
    x_t = (1 - sigma) * x0 + sigma * (noised.target_v + x0)
    torch.testing.assert_close(loss(policy_v), 5 * mean_square(x_t - sigma * policy_v - x0))


def test_unweighted_it_is_one_regression() -> None:
    """Its gradient is 5·σ²·β times that of mean (v − [v_old + (2r − 1)/β·(v* − v_old)])²."""
    loss, policy_v, noised = loss_of(ADVANTAGE, beta=0.4, adaptive_weight=False)
    share, old_v = preference(noised.batch.advantage, BOUND), noised.predicted["old_v"]
    target = step_from(old_v, (2 * share - 1) / 0.4, noised.target_v, old_v)
    expected = gradient(lambda v: 5 * 0.4 * noised.sigma**2 * mean_square(v - target), policy_v)
    torch.testing.assert_close(gradient(loss, policy_v), expected)


def test_what_becomes_of_advantages() -> None:
    """As the release's modes; each loss is that of the changed advantages with all of them."""
    advantage = torch.tensor([2.0, -3.0, 0.0, 0.5, 4.0, -1.0])
    modes = {
        "positive_only": [2.0, 0.0, 0.0, 0.5, 4.0, 0.0],
        "negative_only": [0.0, -3.0, 0.0, 0.0, 0.0, -1.0],
        "one_only": [1.0, 0.0, 0.0, 1.0, 1.0, 0.0],
        "binary": [1.0, -1.0, 0.0, 1.0, 1.0, -1.0],
        "all": advantage.tolist(),
    }
    for mode, changed in modes.items():
        assert nft_module.shaped(advantage, mode).tolist() == changed
        (loss, policy_v, _), (plain, _, _) = loss_of(advantage, adv_mode=mode), loss_of(torch.tensor(changed))
        assert torch.equal(loss(policy_v), plain(policy_v))


def test_the_best_images_may_be_held_most(random_pipeline: Path) -> None:
    """With equal weights for best and worst, it is the plain KL term; else it is theirs by the advantage."""
    gradients = {}
    for worst in (None, 0.5, 0.0):
        case = Case(random_pipeline, config_of("nft", kl_weight=0.5, kl_weight_worst=worst))
        gradients[worst] = case.gradient(micro_batch=12)[0]
    assert_close = torch.testing.assert_close
    assert_close(gradients[0.5], gradients[None])
    case.batch = replace(case.batch, advantage=torch.full_like(case.batch.advantage, -5.0))
    held_least = case.gradient(micro_batch=12)[0]
    case.config = config_of("nft", kl_weight=0.0)
    assert_close(held_least, case.gradient(micro_batch=12)[0])
    assert not torch.allclose(gradients[0.0], gradients[None])


def written_out(case: Case) -> Tensor:
    """The released loss over the whole batch, in plain tensor arithmetic."""
    batch, models, config = case.batch, case.models, case.config.nft
    models.load_behaviour(case.old)
    steps = draw_training_steps(batch.iteration, count=3, among=5, seed=0)
    losses = []
    for slot, step in enumerate(steps):
        sigma, timestep = batch.schedule.sigmas[step], batch.schedule.timesteps[step]
        noise = philox_normal(
            batch.x0.shape[1:],
            torch.arange(GROUPS * SIZE),
            seed=stream_seed(0, "training noise"),
            draw=batch.iteration * 3 + slot,
        )
        assert not torch.equal(noise[0], noise[1]), "each image has its own"
        x_t = (1 - sigma) * batch.x0 + sigma * noise
        with torch.no_grad():
            old, ref = (predict(m, x_t, timestep, batch.text) for m in (models.behaviour, models.base))
        policy = predict(models.policy, x_t, timestep, batch.text)
        share = (batch.advantage / 10 + 0.5).clamp(0, 1)
        level = sigma.expand(len(x_t))
        loss = released(policy, old, batch.x0, x_t, level, share, config.beta)
        losses.append(loss + config.kl_weight * (policy - ref).square().mean((1, 2, 3)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_batch_learns_the_loss_written_out(beta: float, kl_weight: float, random_pipeline: Path) -> None:
    case = Case(random_pipeline, config_of("nft", beta=beta, kl_weight=kl_weight))
    loss = written_out(case)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch=GROUPS * SIZE)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert ("kl" in metrics) is (kl_weight > 0)


def test_the_bound_is_that_of_the_advantages(random_pipeline: Path) -> None:
    """Advantages scaled to [−1, 1] say the same preference; the loss is a fifth, as its bound is."""
    case = Case(random_pipeline, config_of("nft", kl_weight=0.0))
    gradient, _ = case.gradient(micro_batch=12)
    case.config = replace(case.config, advantage=replace(case.config.advantage, scale=0.2))
    case.batch = replace(case.batch, advantage=0.2 * case.batch.advantage)
    scaled, _ = case.gradient(micro_batch=12)
    assert torch.linalg.norm(scaled - 0.2 * gradient) < 1e-5 * torch.linalg.norm(scaled)
