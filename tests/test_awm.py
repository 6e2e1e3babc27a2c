"""Advantage Weighted Matching against its loss written out, and what must hold of it."""

from pathlib import Path

import pytest
import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from dgpo_fast.config.objective_options import AWM
from dgpo_fast.models.forward import predict
from dgpo_fast.objectives.awm import log_surrogate, matching_loss
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.noise_levels import NoiseLevels
from dgpo_fast.seeds import stream_seed
from tests.denoising_case import assert_is_derivative, config_of, error_gradient, gradient, make_noised, per_sample
from tests.objective_case import GROUPS, SIZE, Case

ADVANTAGE = torch.tensor([1.0, -0.4, 0.2, 0.5, -1.0, 0.7])
WEIGHTINGS = ("uniform", "sigma", "sigma2", "huber", "ghuber")


def loss_of(advantage: Tensor, **settings: object) -> tuple:
    """(the loss as a function of the policy's velocity, the policy's velocity, the samples)."""
    policy_v, noised = make_noised(advantage)
    config, old_v = AWM(**settings), noised.predicted["old_v"]  # type: ignore[arg-type]
    return lambda v: matching_loss(v, old_v, noised, config)["loss"], policy_v, noised


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_gradient_is_the_derivative(weighting: str) -> None:
    """With a clip, where the ratio is against θ_old."""
    loss, policy_v, _ = loss_of(ADVANTAGE, weighting=weighting, clip_range=0.02)
    assert_is_derivative(loss, policy_v)


def test_without_a_clip_a_good_image_is_flow_matching() -> None:
    """A = 1, uniform: the gradient is that of mean (v − v*)², and the loss is −1, since ρ is 1."""
    loss, policy_v, noised = loss_of(torch.ones(6), weighting="uniform")
    torch.testing.assert_close(gradient(loss, policy_v), error_gradient(policy_v, noised))
    assert torch.equal(loss(policy_v), -torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize(("weighting", "power"), [("uniform", 0), ("sigma", 1), ("sigma2", 2)])
def test_weights_of_levels(weighting: str, power: int) -> None:
    loss, policy_v, noised = loss_of(ADVANTAGE, weighting=weighting)
    scale = ADVANTAGE.double() * noised.sigma**power
    torch.testing.assert_close(gradient(loss, policy_v), per_sample(scale) * error_gradient(policy_v, noised))


def test_ghuber() -> None:
    """Its slope is σ·(d + 1e-10)^(p − 1); with p = 1 it is the weighting by σ; and −σ·(d^p)/p but for a constant."""
    loss, policy_v, noised = loss_of(ADVANTAGE, weighting="ghuber", ghuber_power=0.25)
    error = mean_square(policy_v - noised.target_v).detach()
    scale = ADVANTAGE * noised.sigma * (error + 1e-10) ** (0.25 - 1)
    torch.testing.assert_close(gradient(loss, policy_v), per_sample(scale) * error_gradient(policy_v, noised))
    one, sigma = AWM(weighting="ghuber", ghuber_power=1.0), AWM(weighting="sigma")
    torch.testing.assert_close(*(log_surrogate(error, noised.sigma, config) for config in (one, sigma)))
    half, huber = AWM(ghuber_power=0.5), AWM(weighting="huber")
    torch.testing.assert_close(*(k * log_surrogate(error, noised.sigma, c) for k, c in ((1, half), (2, huber))))
    assert float(log_surrogate(torch.tensor([16.0]), torch.tensor([0.5]), huber)) == pytest.approx(-0.5 * (4 - 1e-5))
    quarter = log_surrogate(torch.tensor([16.0]), torch.tensor([0.5]), AWM())
    assert float(quarter) == pytest.approx(-0.5 * (2 - 1e-10**0.25) / 0.25)


def test_the_clip_stops_what_has_gone_far_enough() -> None:
    """A > 0 and ρ > 1 + c, or A < 0 and ρ < 1 − c: no gradient. With a wide clip, all have one."""
    loss, policy_v, noised = loss_of(ADVANTAGE, weighting="uniform", clip_range=0.02)
    old = mean_square(noised.predicted["old_v"] - noised.target_v)
    ratio = torch.exp(old - mean_square(policy_v - noised.target_v)).detach()
    stopped = torch.where(ADVANTAGE > 0, ratio > 1.02, ratio < 0.98)
    assert 0 < stopped.sum() < 6
    assert torch.equal(gradient(loss, policy_v).flatten(1).abs().amax(1) == 0, stopped)
    loss, policy_v, _ = loss_of(ADVANTAGE, weighting="uniform", clip_range=1e9)
    assert (gradient(loss, policy_v).flatten(1).abs().amax(1) > 0).all()


def test_it_is_ram_with_a_kl_weight(random_pipeline: Path) -> None:
    """Uniform with the KL weight 1/m, times m, is RAM with v_b the policy's own."""
    levels = {"levels": "linear", "timesteps": 2}
    m = 40.0
    awm = Case(random_pipeline, config_of("awm", weighting="uniform", kl_weight=1 / m, ema_weight=0.0, **levels))
    ram = Case(random_pipeline, config_of("ram", multiplier=m, residual="policy", **levels))
    ours, theirs = awm.gradient(micro_batch=12)[0], ram.gradient(micro_batch=12)[0]
    assert torch.linalg.norm(m * ours - theirs) < 1e-4 * torch.linalg.norm(theirs)


def test_equal_rewards_leave_only_what_holds_back(random_pipeline: Path) -> None:
    """A = 0: the gradient of the two pulls, and none at all if there are none."""
    pulls = {"kl_weight": 0.2, "ema_weight": 0.7}
    case = Case(random_pipeline, config_of("awm", levels="linear", **pulls))
    case.batch.advantage.zero_()
    found, metrics = case.gradient(micro_batch=12)
    expected = 0
    for left_out in pulls:
        case.config = config_of("awm", levels="linear", **{**pulls, left_out: 0.0})
        expected = expected + case.gradient(micro_batch=12)[0]
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(found)
    assert float(metrics["loss"]) == pytest.approx(0.2 * float(metrics["kl"]) + 0.7 * float(metrics["old_distance"]))
    case.config = config_of("awm", levels="linear", kl_weight=0.0, ema_weight=0.0)
    assert case.gradient(micro_batch=12)[0].abs().max() == 0


def test_the_pull_to_old_begins_at_0(random_pipeline: Path) -> None:
    """As long as θ is θ_old it has neither a value nor a gradient."""
    settings = {"levels": "linear", "kl_weight": 0.0}
    case = Case(random_pipeline, config_of("awm", ema_weight=0.0, **settings))
    case.old = {name: weight.detach().clone() for name, weight in case.models.weights.items()}
    without = case.gradient(micro_batch=12)[0]
    case.config = config_of("awm", ema_weight=5.0, **settings)
    found, metrics = case.gradient(micro_batch=12)
    # The behaviour copy's LoRA is merged: its predictions differ by rounding.
    assert float(metrics["old_distance"]) < 1e-9
    assert torch.linalg.norm(found - without) < 1e-4 * torch.linalg.norm(without)


def written_out(case: Case) -> Tensor:
    """The loss over the whole batch, in plain tensor arithmetic."""
    batch, models, config = case.batch, case.models, case.config.awm
    models.load_behaviour(case.old)
    number = torch.arange(GROUPS * SIZE)
    log_ratios, pulls = [], []
    for level in NoiseLevels("linear", 3, seed=0).draw(batch.iteration, batch.schedule, number):
        noise = philox(batch.x0, number, level.draw)
        sigma = per_sample(level.sigma)
        x_t, target = (1 - sigma) * batch.x0 + sigma * noise, noise - batch.x0
        with torch.no_grad():
            old, ref = (predict(m, x_t, level.timestep, batch.text) for m in (models.behaviour, models.base))
        policy = predict(models.policy, x_t, level.timestep, batch.text)
        d, d_old = ((v - target).square().mean((1, 2, 3)) for v in (policy, old))
        values, old_values = (-level.sigma * ((x + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25 for x in (d, d_old))
        log_ratios.append(values - (values.detach() if config.clip_range is None else old_values))
        for weight, anchor in ((config.kl_weight, ref), (config.ema_weight, old)):
            pulls.append(weight * (policy - anchor).square().mean((1, 2, 3)))
    log_ratio, clip = torch.stack(log_ratios), config.clip_range or 1e9
    ratio = torch.exp(log_ratio.mean(0) if config.ratio == "mean" else log_ratio)
    loss = torch.maximum(-batch.advantage * ratio, -batch.advantage * ratio.clamp(1 - clip, 1 + clip))
    return loss.mean() + torch.stack(pulls).sum(0).mean() / 3


def philox(x0: Tensor, number: Tensor, draw: int) -> Tensor:
    """ε of each sample."""
    return philox_normal(tuple(x0.shape[1:]), number, seed=stream_seed(0, "training noise"), draw=draw)


@pytest.mark.parametrize(
    ("clip_range", "ratio"), [(None, "level"), (0.01, "level"), (0.01, "mean"), (None, "mean"), (1e9, "mean")]
)
def test_a_batch_learns_the_loss_written_out(clip_range: float | None, ratio: str, random_pipeline: Path) -> None:
    settings = {"levels": "linear", "kl_weight": 0.3, "ema_weight": 0.5}
    case = Case(random_pipeline, config_of("awm", clip_range=clip_range, ratio=ratio, **settings))
    loss = written_out(case)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch=GROUPS * SIZE)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert ("clipped_fraction" in metrics) is (clip_range is not None)
