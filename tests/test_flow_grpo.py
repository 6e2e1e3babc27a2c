"""Flow-GRPO against its loss written out and computed by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from dgpo_fast.models.forward import predict
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.flow_grpo import diffusion
from dgpo_fast.objectives.registry import load_objective
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.rollout.step_noise import Transitions
from tests.objective_case import GROUPS, SIZE, Case
from tests.objective_configs import grpo_case, grpo_config, make_batch
from tests.sd3 import stand_in


def grpo_written_out(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and ratios from torch.distributions and the method's formulas, over the whole batch."""
    batch, models, config = case.batch, case.models, case.config.flow_grpo
    losses, ratios = [], []

    def mean(transformer: object, x: torch.Tensor, sigma: torch.Tensor, dt: torch.Tensor, s: float) -> torch.Tensor:
        conditional = predict(transformer, x, 1000 * sigma, batch.text)  # type: ignore[arg-type]
        negative = predict(transformer, x, 1000 * sigma, batch.text.negative())  # type: ignore[arg-type]
        v = negative + 2.0 * (conditional - negative)
        return x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt

    models.load_behaviour(case.old)
    for step in range(batch.schedule.steps - 1):
        sigma, after = batch.schedule.sigmas[step], batch.schedule.sigmas[step + 1]
        s = 0.7 * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
        x, x_next = batch.transitions.states[step], batch.transitions.states[step + 1]
        std = s * math.sqrt(sigma - after)
        policy = mean(models.policy, x, sigma, after - sigma, s)
        with torch.no_grad():
            old, ref = (mean(model, x, sigma, after - sigma, s) for model in (models.behaviour, models.base))
        log_prob, old_log_prob = (Normal(m, std).log_prob(x_next).mean((1, 2, 3)) for m in (policy, old))
        ratio, advantage = torch.exp(log_prob - old_log_prob), batch.advantage
        clipped = torch.clamp(ratio, 1 - config.clip_range, 1 + config.clip_range)
        kl = ((policy - ref) ** 2).mean() / (2 * s**2)
        losses.append(torch.maximum(-advantage * ratio, -advantage * clipped).mean() + config.kl_weight * kl)
        ratios.append(ratio.detach())
    return torch.stack(losses).mean(), ratios


@pytest.mark.parametrize("settings", [{"kl_weight": 0.0, "clip_range": 0.01}, {"kl_weight": 0.04, "clip_range": 1e9}])
def test_flow_grpo_is_the_loss_written_out(settings: dict, random_pipeline: Path) -> None:
    """Gradient and loss equal those from torch.distributions; the old log-probabilities are those of the rollout."""
    case = grpo_case(random_pipeline, **settings)
    loss, ratios = grpo_written_out(case)
    if settings["clip_range"] < 1:
        outside = torch.stack(ratios).sub(1).abs() > settings["clip_range"]
        assert 0 < outside.sum() < outside.numel(), "the case must clip some steps and not others"
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch=GROUPS * SIZE)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    deviation = torch.stack(ratios).sub(1).abs().mean()
    assert float(metrics["ratio_deviation"]) == pytest.approx(float(deviation), rel=1e-3)


def test_flow_grpo_by_hand() -> None:
    """Three samples of two elements, one trained step, from x = (2, 4) at σ = 1 to σ = ½: μ = x − v/2 − x/4, std c = ½.

    The policy's v = (1, 2) gives μ = (1, 2), and the v = (2, 2) of the rollout and of the reference μ_old = (½, 2).
    With z = (x' − μ)/c, ln ρ is −(z·z − z_old·z_old)/(2·2), the mean over two elements; the stored log-probabilities
    have C = −ln ½ − ½·ln 2π = −0.2257914 beside it.

        x' = (1½, 1½): z = (1, −1), z_old = (2, −1), ln ρ = −(2 − 5)/4 =  ¾, ρ = 2.1170; A =  1: max(−ρ, −1.1) = −1.1
        x' = (0, 1½):  z = (−2, −1), z_old = (−1, −1), ln ρ = −(5 − 2)/4 = −¾, ρ = 0.4724; A = −2: max(2ρ, 1.8) = 1.8
        x' = (¾, 2):   z = (−½, 0), z_old = (½, 0), ρ = 1; A = 1: −1

    Their mean is −0.1. KL: s² = c²/(σ − σ_next) = ½, so mean (½, 0)²/(2·½) = 0.125, times 0.04. Of the weight θ in
    θ·v only the third sample and the KL term have a gradient: ∂μ/∂θ = (−½, −1), −∂ρ/∂θ = −(z/c)·∂μ/∂θ/2 = −¼, a
    third of it, and 0.04·(½·−½)/(2·½) = −0.01.
    """
    config = grpo_config(clip_range=0.1, kl_weight=0.04)
    config = replace(config, rollout=replace(config.rollout, guidance_scale=1.0, num_inference_steps=2))
    theta = torch.ones((), requires_grad=True)

    def transformer(v: list[float], weight: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
        return stand_in(
            lambda hidden_states, **_: ((weight * torch.tensor(v)).reshape(1, 2, 1, 1).expand_as(hidden_states),)
        )

    models: Any = SimpleNamespace(
        policy=transformer([1.0, 2.0], theta),
        base=transformer([2.0, 2.0], torch.ones(())),
        weights={"theta": theta},
        device=torch.device("cpu"),
        mixed=False,
    )
    x = torch.tensor([2.0, 4.0]).expand(3, 2)
    after = torch.tensor([[1.5, 1.5], [0.0, 1.5], [0.75, 2.0]])
    log_prob = torch.tensor([-1.25, -0.5, -0.0625]) - 0.2257914
    batch = Batch(
        iteration=0,
        x0=after.reshape(3, 2, 1, 1),
        text=TextEmbeds.of_samples({"prompt": torch.zeros(3, 1, 1), "pooled": torch.zeros(3, 1)}),
        advantage=torch.tensor([1.0, -2.0, 1.0]),
        group_index=torch.zeros(3, dtype=torch.int64),
        sample_index=torch.arange(3),
        group_size=3,
        schedule=Schedule(
            "euler",
            torch.tensor([1.0, 0.5, 0.0]),
            torch.tensor([1000.0, 500.0]),
            torch.tensor([[-0.5], [-0.5]]),
            torch.tensor([[-0.25, 0.5], [-0.25, 0.5]]),
        ),
        transitions=Transitions(
            torch.stack([x, after, after]).reshape(3, 3, 2, 1, 1), torch.stack([log_prob, log_prob])
        ),
    )
    metrics = load_objective(config).accumulate(batch, models, {})
    assert float(metrics["kl"]) == pytest.approx(0.125, rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(-0.1 + 0.04 * 0.125, rel=1e-5)
    assert float(metrics["ratio_deviation"]) == pytest.approx((1.1170000 + 0.5276334 + 0.0) / 3, rel=1e-6)
    assert float(metrics["clipped_fraction"]) == pytest.approx(2 / 3)
    assert float(theta.grad) == pytest.approx(-0.25 / 3 - 0.01, rel=1e-5)


def test_ratio_is_1_on_policy(random_pipeline: Path) -> None:
    """The policy that drew the images has the ratio 1 to rounding, and the plain policy gradient."""
    case = grpo_case(random_pipeline, kl_weight=0.0)
    case.models.load_weights(case.old)
    _, metrics = case.gradient(micro_batch=5)
    assert float(metrics["ratio_deviation"]) < 2e-6
    assert float(metrics["clipped_fraction"]) == 0


def test_diffusion_coefficient(random_pipeline: Path) -> None:
    batch = grpo_case(random_pipeline).batch
    sigma = batch.schedule.sigmas
    assert float(diffusion(batch, 1)) == pytest.approx(0.7 * math.sqrt(sigma[1] / (1 - sigma[1])), rel=1e-5)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 5))
def test_optimizer_steps_share_the_groups_evenly(groups: int, steps: int) -> None:
    """Every group is trained once, in one piece; no step is empty, and none has two groups more than another."""
    batch = make_batch(np.zeros((groups, SIZE), np.float32))
    parts = load_objective(grpo_config(optimizer_steps=steps)).optimizer_batches(batch)
    assert torch.equal(torch.cat([part.x0 for part in parts]), batch.x0)
    sizes = [part.groups for part in parts]
    assert len(sizes) == min(groups, steps) and max(sizes) - min(sizes) <= 1
    assert all(len(part.x0) == part.groups * SIZE == part.transitions.states.shape[1] for part in parts)
