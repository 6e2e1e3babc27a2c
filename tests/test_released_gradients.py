"""Gradients of the released rules and of our own, against each written out in float64 (docs/method.md)."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dgpo_kernels import group_noise
from torch import Tensor, nn
from torch.distributions import Normal

from dgpo_fast.models.forward import predict
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.levels import draw_training_steps
from dgpo_fast.objectives.registry import traits
from dgpo_fast.rollout.step_noise import Transitions
from dgpo_fast.seeds import stream_seed
from tests.objective_case import GROUPS, SIZE, Case, make_config
from tests.objective_configs import grpo_case

RELEASED = {"guided_reference": True, "training_sigma": "timestep"}
OURS = {"guided_reference": False, "training_sigma": "grid"}


def in_float64(case: Case) -> Case:
    """The same with weights, latents, embeddings and gradients in float64."""

    def text(embeds: TextEmbeds) -> TextEmbeds:
        return replace(embeds, rows={name: rows.double() for name, rows in embeds.rows.items()})

    for model in (case.models.base, case.models.behaviour, case.models.policy):
        nn.Module.double(model)
    for weight in case.models.weights.values():
        weight.grad_dtype = torch.float64
    batch, steps = case.batch, case.batch.transitions
    case.batch = replace(
        batch,
        x0=batch.x0.double(),
        text=text(batch.text),
        transitions=steps and Transitions(steps.states.double(), steps.log_prob.double()),
    )
    return case


def both(case: Case, model: nn.Module, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional velocity, from a forward each."""
    conditional = predict(model, x, timestep, case.batch.text)  # type: ignore[arg-type]
    return conditional, predict(model, x, timestep, case.batch.text.negative())  # type: ignore[arg-type]


def dgpo_written_out(case: Case, *, released: bool) -> Tensor:
    """A scalar with the gradient that the release differentiates: mean_i stop[σ(s_g)]·A_i·d_i, beside the KL term.

    By the released rule, σ is the truncated timestep over 1000, and the guided base is the reference everywhere; by our
    own, σ is the grid's, and the guided base is the KL term's reference alone. θ_old is never guided.
    """
    config, batch, models = case.config.dgpo, case.batch, case.models
    models.load_behaviour(case.old)
    steps = draw_training_steps(batch.iteration, count=config.timesteps, among=4, seed=case.config.seed)
    seed, total = stream_seed(case.config.seed, "training noise"), torch.zeros((), dtype=torch.float64)
    for slot, step in enumerate(steps):
        sigma, draw = float(batch.schedule.sigmas[step]), batch.iteration * len(steps) + slot
        timestep = torch.tensor(math.floor(1000 * sigma), dtype=torch.float64)
        assert timestep == batch.schedule.timesteps[step] and timestep != 1000 * sigma, "the case must truncate"
        noise = group_noise(torch.zeros_like(batch.x0), torch.tensor(1.0), batch.group_index, seed=seed, draw=draw)
        level = float(timestep.float() / 1000) if released else sigma
        x_t, target = (1 - level) * batch.x0 + level * noise, noise - batch.x0
        with torch.no_grad():
            conditional, empty = both(case, models.base, x_t, timestep)
            guided = empty + config.kl_guidance_scale * (conditional - empty)
            old = predict(models.behaviour, x_t, timestep, batch.text)
        ref = old if config.reference == "ema" else guided if released else conditional
        policy = predict(models.policy, x_t, timestep, batch.text)
        d, d_ref, d_old = ((v - target).square().mean((1, 2, 3)) for v in (policy, ref, old))
        advantage = batch.advantage.double()
        ratio, clip = torch.exp(d_old - d.detach()), config.clip_range
        clipped = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
        assert 0 < clipped.sum() < len(clipped), "the case must clip some samples and not others"
        score = config.beta / SIZE * (advantage * (d - d_ref)).reshape(GROUPS, SIZE).sum(1)
        strength = torch.sigmoid(score.detach()).repeat_interleave(SIZE)
        total = total + (strength * advantage * torch.where(clipped, d.detach(), d)).mean()
        total = total + config.kl_weight * (policy - guided).square().mean((1, 2, 3)).mean()
    return total / len(steps)


def grpo_written_out(case: Case, *, released: bool) -> Tensor:
    """The loss from torch.distributions; by the released rule, the policy's unconditional velocity is a constant."""
    batch, config, losses = case.batch, case.config.flow_grpo, []
    for step in range(batch.schedule.steps - 1):
        sigma, after = (float(batch.schedule.sigmas[i]) for i in (step, step + 1))
        s, dt = 0.7 * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma))), after - sigma
        x, x_next = batch.transitions.states[step], batch.transitions.states[step + 1]

        def mean(conditional: Tensor, empty: Tensor) -> Tensor:
            v = empty + 2.0 * (conditional - empty)
            return x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt  # noqa: B023

        timestep = batch.schedule.timesteps[step].double()
        conditional, empty = both(case, case.models.policy, x, timestep)
        policy = mean(conditional, empty.detach() if released else empty)
        with torch.no_grad():
            ref = mean(*both(case, case.models.base, x, timestep))
        log_prob = Normal(policy, s * math.sqrt(-dt)).log_prob(x_next).mean((1, 2, 3))
        ratio, advantage = torch.exp(log_prob - batch.transitions.log_prob[step]), batch.advantage.double()
        clipped = torch.clamp(ratio, 1 - config.clip_range, 1 + config.clip_range)
        kl = ((policy - ref) ** 2).mean() / (2 * s**2)
        losses.append(torch.maximum(-advantage * ratio, -advantage * clipped).mean() + config.kl_weight * kl)
    return torch.stack(losses).mean()


def gradient_of(case: Case, scalar: Tensor) -> Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(scalar, list(case.models.weights.values()))])


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm."""
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("variant", [{"kl_weight": 0.02}, {"kl_weight": 0.0}, {"reference": "ema", "beta": 2000.0}])
def test_guided_dgpo(variant: dict, released: bool, random_pipeline: Path) -> None:
    """With guidance on the reference, against the frozen base with and without a KL term, and against θ_old."""
    settings = make_config(kl_guidance_scale=4.5, **(RELEASED if released else OURS), **variant)
    case = in_float64(Case(random_pipeline, settings))
    found, _ = case.gradient(micro_batch=GROUPS * SIZE)
    assert difference(found, gradient_of(case, dgpo_written_out(case, released=released))) < 1e-6
    assert difference(found, gradient_of(case, dgpo_written_out(case, released=not released))) > 1e-4


@pytest.mark.parametrize("only", RELEASED)
def test_each_setting_of_dgpo_alone_is_neither_rule(only: str, random_pipeline: Path) -> None:
    """Both differences count."""
    case = in_float64(Case(random_pipeline, make_config(kl_guidance_scale=4.5, **{**OURS, only: RELEASED[only]})))
    found, _ = case.gradient(micro_batch=GROUPS * SIZE)
    for released in (True, False):
        assert difference(found, gradient_of(case, dgpo_written_out(case, released=released))) > 1e-4


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_guided_flow_grpo(kl_weight: float, released: bool, random_pipeline: Path) -> None:
    """With and without the gradient of the unconditional velocity; a micro-batch of 5 has the same."""
    case = grpo_case(random_pipeline, kl_weight=kl_weight, clip_range=0.02, unconditional_gradient=not released)
    case = in_float64(case)
    expected, other = (gradient_of(case, grpo_written_out(case, released=rule)) for rule in (released, not released))
    for micro_batch in (5, GROUPS * SIZE):
        found, _ = case.gradient(micro_batch)
        assert difference(found, expected) < 1e-6
    assert difference(found, other) > 1e-2


@pytest.mark.parametrize(("choice", "sigma"), [("grid", 0.99967), ("timestep", 0.999)])
def test_a_shared_level_is_judged_by_the_training_sigma(choice: str, sigma: float) -> None:
    """`engine.share_first_level` goes by how far σ is from 1: by that of the training latents."""
    config = make_config(training_sigma=choice)
    config = replace(config, rollout=replace(config.rollout, shift=3.0))
    assert traits(config).shared_sigma == pytest.approx(sigma, abs=5e-6)
