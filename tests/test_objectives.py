"""Diffusion-DPO and Flow-GRPO, rollouts with noise, and objectives from outside the package."""

import ast
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dgpo_kernels import group_noise, guided_euler_step, philox_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.distributions import Normal

from dgpo_fast.config.options import Config, Data, DiffusionDPO, Distributed, Engine, FlowGRPO, Policy, Rollout
from dgpo_fast.distributed import BatchPart
from dgpo_fast.engine.batches import batch_sizes
from dgpo_fast.errors import UserError
from dgpo_fast.memory.predict import Predictor
from dgpo_fast.models.architecture import read_architecture
from dgpo_fast.models.forward import predict
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.dgpo import DGPOObjective
from dgpo_fast.objectives.diffusion_dpo import DiffusionDPOObjective, best_and_worst
from dgpo_fast.objectives.flow_grpo import diffusion
from dgpo_fast.objectives.levels import predict_levels
from dgpo_fast.objectives.protocol import Objective, Traits
from dgpo_fast.objectives.registry import BUILT_IN, load_objective, traits
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import sample_latents
from dgpo_fast.rollout.schedule import Schedule, _stochastic_steps, make_schedule
from dgpo_fast.rollout.step_noise import StepNoise, Transitions, gaussian_log_prob
from dgpo_fast.seeds import stream_seed
from tests.objective_case import GROUPS, SIZE, Case, make_config

PACKAGE = Path(__file__).parents[1] / "dgpo_fast"


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

    text = TextEmbeds.of_samples(torch.zeros(len(noise), 1, 1), torch.zeros(len(noise), 1))
    draw = Draw(schedule, guidance_scale=1.0, batch_size=len(noise))
    return sample_latents(Transformer(), noise, text, text[:1], draw, step_noise=step_noise)  # type: ignore[arg-type]


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


def grpo_config(**flow_grpo: object) -> Config:
    config = make_config()
    rollout = replace(config.rollout, solver="euler", noise_level=0.7, guidance_scale=2.0)
    ema = replace(config.ema, switch_ema_ref=None)
    return replace(config, objective="flow_grpo", rollout=rollout, ema=ema, flow_grpo=FlowGRPO(**flow_grpo))


def grpo_case(folder: Path, **flow_grpo: object) -> Case:
    """Groups drawn with noise by θ_old, and a policy that has moved away from it."""
    config = grpo_config(**flow_grpo)
    case = Case(folder, config)
    rollout = config.rollout
    schedule = make_schedule("euler", rollout.num_inference_steps, rollout.shift, rollout.noise_level)
    case.models.load_behaviour(case.old)
    step_noise = StepNoise(torch.arange(GROUPS * SIZE), seed=5, draw=7, keep=True)
    x0 = sample_latents(
        case.models.behaviour,
        case.batch.x0,
        case.batch.text,
        case.batch.empty,
        Draw(schedule, rollout.guidance_scale, batch_size=GROUPS * SIZE),
        step_noise=step_noise,
    )
    case.batch = replace(case.batch, x0=x0, schedule=schedule, transitions=step_noise.transitions)
    return case


def grpo_written_out(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and ratios from torch.distributions and the method's formulas, over the whole batch."""
    batch, models, config = case.batch, case.models, case.config.flow_grpo
    losses, ratios = [], []

    def mean(transformer: object, x: torch.Tensor, sigma: torch.Tensor, dt: torch.Tensor, s: float) -> torch.Tensor:
        conditional = predict(transformer, x, 1000 * sigma, batch.text)  # type: ignore[arg-type]
        empty = predict(transformer, x, 1000 * sigma, batch.empty.repeat_interleave(len(x)))  # type: ignore[arg-type]
        v = empty + 2.0 * (conditional - empty)
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


@pytest.mark.parametrize("settings", [{"kl_weight": 0.0, "clip_range": 0.02}, {"kl_weight": 0.04, "clip_range": 1e9}])
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
        return lambda hidden_states, **_: ((weight * torch.tensor(v)).reshape(1, 2, 1, 1).expand_as(hidden_states),)

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
        text=TextEmbeds.of_samples(torch.zeros(3, 1, 1), torch.zeros(3, 1)),
        empty=TextEmbeds.of_samples(torch.zeros(1, 1, 1), torch.zeros(1, 1)),
        advantage=torch.tensor([1.0, -2.0, 1.0]),
        group_index=torch.zeros(3, dtype=torch.int64),
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


def make_batch(advantage: np.ndarray) -> Batch:
    """Groups with these advantages (P, G) and latents that are their own numbers."""
    groups, size = advantage.shape
    count = groups * size
    number = torch.arange(count, dtype=torch.float32)
    return Batch(
        iteration=0,
        x0=number.reshape(-1, 1, 1, 1),
        text=TextEmbeds.of_samples(number.reshape(-1, 1, 1), number.reshape(-1, 1)),
        empty=TextEmbeds.of_samples(torch.zeros(1, 1, 1), torch.zeros(1, 1)),
        advantage=torch.from_numpy(advantage).flatten(),
        group_index=torch.arange(groups).repeat_interleave(size),
        group_size=size,
        schedule=make_schedule("euler", 2, 3.0, 0.7),
        transitions=Transitions(number.reshape(1, -1), number[None]),
    )


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(-3, 3, width=32)))
def test_pairs_are_best_and_worst(advantage: np.ndarray) -> None:
    """Each group gives its best image with +1 and its worst with −1, in their order, or nothing where all are equal."""
    pairs = best_and_worst(make_batch(advantage))
    assert pairs.group_size == 2 and pairs.groups == len(advantage)
    chosen = advantage.ravel()[pairs.x0.flatten().long()].reshape(-1, 2)
    sign = pairs.advantage.numpy().reshape(-1, 2)
    differ = np.ptp(advantage, axis=1) > 0
    best = np.where(sign[:, 0] > 0, chosen[:, 0], chosen[:, 1])
    worst = np.where(sign[:, 0] > 0, chosen[:, 1], chosen[:, 0])
    assert (best == advantage.max(1)).all() and (worst == advantage.min(1)).all()
    assert (pairs.x0.flatten().long() // advantage.shape[1] == pairs.group_index).all()
    assert (np.sort(sign) == np.where(differ[:, None], [[-1.0, 1.0]], 0.0)).all()


def test_diffusion_dpo_is_dgpo_on_a_pair(random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two with the advantages ±1, no clip, no KL, at one noise level: β times DGPO's loss and gradient."""
    dgpo = make_config(timesteps=1, high_noise_steps=1, clip_range=None, kl_weight=0.0)
    case = Case(random_pipeline, replace(dgpo, diffusion_dpo=DiffusionDPO(beta=dgpo.dgpo.beta, timesteps=1)))
    sign = torch.tensor([1.0, -1.0]).repeat(GROUPS * SIZE // 2)
    pairs = torch.arange(GROUPS * SIZE // 2).repeat_interleave(2)
    schedule = make_schedule("euler", 6, 3.0)
    case.batch = replace(case.batch, advantage=sign, group_index=pairs, group_size=2, schedule=schedule)
    sigma = schedule.sigmas[0].expand(GROUPS * SIZE)
    monkeypatch.setattr(DiffusionDPOObjective, "_noise_levels", lambda *_: sigma)
    group, group_metrics = case.gradient(micro_batch=12)
    case.config = replace(case.config, objective="diffusion_dpo")
    pair, pair_metrics = case.gradient(micro_batch=12)
    beta = dgpo.dgpo.beta
    assert group.abs().max() > 0
    assert torch.linalg.norm(pair - beta * group) < 1e-5 * torch.linalg.norm(pair)
    assert float(pair_metrics["loss"]) == pytest.approx(beta * float(group_metrics["loss"]), rel=1e-5)


def test_diffusion_dpo_is_the_loss_written_out(random_pipeline: Path) -> None:
    """−log sigmoid of the pairs, ε and σ shared in a pair and logit-normal."""
    config = replace(make_config(), objective="diffusion_dpo", diffusion_dpo=DiffusionDPO(beta=40.0, timesteps=2))
    case = Case(random_pipeline, config)
    batch, models = case.batch, case.models
    by_group = batch.advantage.reshape(GROUPS, SIZE)
    best, worst = (i + torch.arange(GROUPS) * SIZE for i in (by_group.argmax(1), by_group.argmin(1)))
    losses = []
    for slot in range(2):
        draw = batch.iteration * 2 + slot
        normal = philox_normal((1,), torch.arange(GROUPS), seed=stream_seed(0, "noise levels"), draw=draw)
        sigma, d = torch.sigmoid(normal.flatten()), {}
        for name, rows in (("best", best), ("worst", worst)):
            x0, seed = batch.x0[rows], stream_seed(0, "training noise")
            noise = group_noise(torch.zeros_like(x0), torch.tensor(1.0), torch.arange(GROUPS), seed=seed, draw=draw)
            level = sigma.reshape(-1, 1, 1, 1)
            x_t, target = (1 - level) * x0 + level * noise, noise - x0
            for model in ("policy", "base"):
                v = predict(getattr(models, model), x_t, 1000 * sigma, batch.text[rows])
                d[name, model] = (v - target).square().mean((1, 2, 3))
        inner = (d["best", "policy"] - d["best", "base"]) - (d["worst", "policy"] - d["worst", "base"])
        losses.append(-torch.nn.functional.logsigmoid(-40.0 / 2 * inner).mean())
    loss = torch.stack(losses).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(models.weights.values()))])
    found, metrics = case.gradient(micro_batch=12)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)


def test_equal_rewards_give_a_pair_without_gradient(random_pipeline: Path) -> None:
    case = Case(random_pipeline, replace(make_config(), objective="diffusion_dpo"))
    case.batch = replace(case.batch, advantage=torch.zeros(GROUPS * SIZE))
    assert case.gradient(micro_batch=12)[0].abs().max() == 0


@pytest.mark.parametrize("objective", ["diffusion_dpo", "flow_grpo"])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_do_not_change_the_gradient(objective: str, micro_batch: int, random_pipeline: Path) -> None:
    """One sample at a time and odd parts give the whole batch's gradient and metrics to 1e-5."""
    if objective == "flow_grpo":
        case = grpo_case(random_pipeline, clip_range=0.02)
    else:
        case = Case(random_pipeline, replace(make_config(), objective=objective))
    whole, whole_metrics = case.gradient(micro_batch=GROUPS * SIZE)
    parts, parts_metrics = case.gradient(micro_batch=micro_batch)
    assert (parts - whole).abs().max() < 1e-5 * whole.abs().max()
    for name, value in whole_metrics.items():
        assert float(parts_metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


SAVING = ["dgpo", "diffusion_dpo", "flow_grpo", "flow_grpo with a KL term"]


def saving_case(objective: str, folder: Path, **engine: bool) -> Case:
    """Three groups in forwards of 5 samples, with these savings and no others."""
    savings = Engine(**{"batch_timesteps": False, "skip_equal_groups": False, **engine})
    if objective.startswith("flow_grpo"):
        case = grpo_case(folder, clip_range=0.02, kl_weight=0.04 if "KL" in objective else 0.0)
    else:
        case = Case(folder, replace(make_config(kl_weight=0.0, clip_range=None), objective=objective))
    case.config = replace(case.config, engine=savings)
    return case


def watched(case: Case, micro_batch: int = 12) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[int]]]:
    """Gradient, metrics, and the rows of each forward of base and policy."""
    rows: dict[str, list[int]] = {"base": [], "policy": []}
    hooks = [
        getattr(case.models, name).register_forward_pre_hook(
            lambda _, __, kwargs, seen=seen: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        for name, seen in rows.items()
    ]
    gradient, metrics = case.gradient(micro_batch)
    for hook in hooks:
        hook.remove()
    return gradient, metrics, rows


def assert_same(found: tuple, expected: tuple) -> None:
    """Gradient and metrics, within rounding."""
    assert expected[0].abs().max() > 0
    assert (found[0] - expected[0]).abs().max() < 1e-5 * expected[0].abs().max()
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("objective", ["dgpo", "diffusion_dpo", "flow_grpo with a KL term"])
def test_levels_are_predicted_in_full_batches(objective: str, random_pipeline: Path) -> None:
    """With `engine.batch_timesteps` the reference gets the rows that it gets level by level, in batches of which only
    the last one is not full; what is learnt is the same."""
    one_by_one = watched(saving_case(objective, random_pipeline))
    together = watched(saving_case(objective, random_pipeline, batch_timesteps=True))
    assert_same(together, one_by_one)
    rows, batch = together[2]["base"], 10 if "KL" in objective else 5  # with guidance a sample has two rows
    assert sum(rows) == sum(one_by_one[2]["base"]) and len(rows) < len(one_by_one[2]["base"])
    assert all(count == batch for count in rows[:-1]) and rows[-1] <= batch
    assert together[2]["policy"] == one_by_one[2]["policy"]


@pytest.mark.parametrize("objective", SAVING)
def test_groups_that_prefer_nothing_are_left_out(objective: str, random_pipeline: Path) -> None:
    """With `engine.skip_equal_groups` the forwards of an equal group, a third of all, are not made unless a KL term
    needs them; gradient and metrics are those of making them."""
    found = {}
    for skip in (False, True):
        case = saving_case(objective, random_pipeline, skip_equal_groups=skip)
        case.batch.advantage[SIZE : 2 * SIZE] = 0
        found[skip] = watched(case)
    assert_same(found[True], found[False])
    for name in ("base", "policy"):
        everything, needed = sum(found[False][2][name]), sum(found[True][2][name])
        assert 3 * needed == (3 if "KL" in objective else 2) * everything, name


@pytest.mark.parametrize("objective", SAVING[:-1])
def test_nothing_to_learn_is_a_step_all_the_same(objective: str, random_pipeline: Path) -> None:
    """Where no group prefers anything, no forward is made and the optimizer takes the step of a gradient of 0, from
    its momentum: the one that it takes where every forward is made."""
    after = {}
    for skip in (False, True):
        case = saving_case(objective, random_pipeline, skip_equal_groups=skip)
        weights = list(case.models.weights.values())
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        case.gradient(micro_batch=12)
        optimizer.step()
        before = torch.cat([weight.detach().flatten() for weight in weights])
        case.batch = replace(case.batch, advantage=torch.zeros(GROUPS * SIZE))
        gradient, metrics, rows = watched(case)
        assert gradient.abs().max() == 0 and any(rows["policy"]) is not skip
        expected = {"dgpo": math.log(2) / 100, "diffusion_dpo": math.log(2), "flow_grpo": 0.0}[objective]
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        after[skip] = torch.cat([weight.detach().flatten() for weight in weights])
        assert not torch.equal(after[skip], before)
    assert torch.equal(after[True], after[False])


@pytest.mark.parametrize("objective", SAVING)
@pytest.mark.parametrize("equal", [None, 0, 2])
def test_savings_do_not_change_what_processes_learn_together(
    equal: int | None, objective: str, random_pipeline: Path
) -> None:
    """Gradients and metrics of a process with two groups and of one with a group add up to those of one that has all,
    wherever the group is that prefers nothing; a third process has no sample."""
    case = saving_case(objective, random_pipeline, batch_timesteps=True, skip_equal_groups=True)
    if equal is not None:
        case.batch.advantage[equal * SIZE : (equal + 1) * SIZE] = 0
    whole, gradient, metrics = case.batch, 0, {}
    expected = case.gradient(micro_batch=12)
    for first, stop in ((0, 2), (2, 3), (3, 3)):
        rows = slice(first * SIZE, stop * SIZE)
        case.batch = replace(whole[rows], part=BatchPart(rows.start, GROUPS, SIZE, whole.advantage))
        for weight in case.models.weights.values():
            weight.grad = torch.zeros_like(weight)
        part = load_objective(case.config).accumulate(case.batch, case.models, case.old)
        gradient = gradient + torch.cat([weight.grad.flatten() for weight in case.models.weights.values()])
        for name, value in part.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    assert_same((gradient, metrics), expected)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 5))
def test_any_levels_in_any_batches(samples: int, batch_size: int, levels: int) -> None:
    """Every level gets its own predictions, with its own timesteps and prompts, and never before its rows are
    needed."""
    forwards = []

    def forward(x: torch.Tensor, timestep: torch.Tensor, text: TextEmbeds) -> dict[str, torch.Tensor]:
        forwards.append(len(x))
        return {"v": torch.stack([x.flatten(), timestep, text.gathered()[1].flatten()], 1)}

    numbers = torch.arange(samples, dtype=torch.float32)
    text = TextEmbeds.of_samples(numbers.reshape(-1, 1, 1), numbers.reshape(-1, 1) / 10)
    x_t = [(100 * level + numbers).reshape(-1, 1, 1, 1) for level in range(levels)]
    timesteps = [torch.tensor(float(level)) if level % 2 else level + numbers / 100 for level in range(levels)]
    for level, found in enumerate(predict_levels(forward, x_t, timesteps, text, batch_size)):
        assert len(forwards) == -(-(level + 1) * samples // batch_size)
        expected = [x_t[level].flatten(), timesteps[level].expand(samples), text.pooled.flatten()]
        assert torch.equal(found["v"], torch.stack(expected, 1))
    assert max(forwards) <= batch_size and sum(forwards) == levels * samples


@pytest.mark.parametrize("objective", SAVING)
@pytest.mark.parametrize("micro_batch", [3, 12])
def test_padding_adds_nothing(objective: str, micro_batch: int, random_pipeline: Path) -> None:
    """With sharded weights, processes of two groups, of one and of none send equally many rows through the policy and
    the base, whatever the padding holds; gradients and metrics add up to those of one process."""
    case = saving_case(objective, random_pipeline, batch_timesteps=True)
    whole, gradient, metrics, counts = case.batch, 0, {}, []
    expected = case.gradient(micro_batch)
    edges = tuple(SIZE * group for group in (0, 2, 3, 3))
    for first, stop in pairwise(edges):
        part = BatchPart(first, GROUPS, SIZE, whole.advantage, edges=edges)
        case.batch = whole.taken(torch.arange(first, stop), part)
        assert (len(case.batch.x0), case.batch.own) == (2 * SIZE, stop - first)
        assert case.batch.weight.tolist() == [1.0] * (stop - first) + [0.0] * case.batch.padding
        mine = watched(case, micro_batch)
        gradient = gradient + mine[0]
        counts.append(mine[2])
        for name, value in mine[1].items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    assert counts[0] == counts[1] == counts[2]
    assert_same((gradient, metrics), expected)


ROOMS_WITHOUT_NAMES = ("engine", "learning", "memory", "rollout", "run")


def test_the_loop_knows_no_objective() -> None:
    """Neither the loop nor the command, the engine or the prediction of memory names an objective, or reads one's
    settings."""
    names = {*BUILT_IN, *(cls.__name__ for cls in (DGPOObjective, DiffusionDPOObjective)), "FlowGRPOObjective"}
    for file in (
        "train.py",
        "build.py",
        "lifecycle.py",
        "trainer.py",
        *(f"{room}/{path.name}" for room in ROOMS_WITHOUT_NAMES for path in (PACKAGE / room).glob("*.py")),
    ):
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
        assert not used & names, (file, used & names)


class Outside(Objective):
    """An objective of a user's that says nothing of itself."""

    def __init__(self, config: Config):
        self.micro_batch = config.policy.micro_batch_size  # refuses "auto", which is still to be chosen

    def accumulate(self, batch: Batch, models: object, old: object) -> dict:
        return {}


class OutsideDeclares(Outside):
    """The same, with guidance in all its forwards, at three levels at once, and on sharded weights."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return Traits(levels_at_once=3, guided_base=True, guided_policy=True, shardable=True)


made_by_a_function = lambda config: OutsideDeclares(config)  # noqa: E731
with_an_argument = partial(OutsideDeclares)


def test_an_objective_from_outside_is_treated_as_it_declares(random_pipeline: Path) -> None:
    """What is padded, predicted and refused goes by what the objective says, and by the defaults where it is silent."""
    config = replace(make_config(), policy=Policy(micro_batch="auto"), rollout=Rollout(group_size=2, groups=5))
    silent, says = (replace(config, objective=f"{__name__}:{name}") for name in ("Outside", "OutsideDeclares"))
    assert traits(silent) == Traits()
    assert traits(says) == traits(replace(says, objective=f"{__name__}:with_an_argument"))
    assert traits(says) == Traits(levels_at_once=3, guided_base=True, guided_policy=True, shardable=True)
    chosen = replace(config.policy, micro_batch=4)
    frozen = [batch_sizes(replace(of, policy=chosen), processes=1).frozen for of in (silent, says)]
    assert frozen == [10, 30]
    predictor = Predictor(read_architecture(random_pipeline), torch.float32)
    latent = 4 * 16 * 8 * 8
    # Noisy latents of three levels and not of one; velocities, of three models, of 10 samples and 30, and not of 10.
    assert predictor.inputs(says) - predictor.inputs(silent) == latent * (10 * 2 + 3 * 20)
    forwards = [predictor.predict(of, 4).phases["reference forwards"] - predictor.inputs(of) for of in (silent, says)]
    assert forwards[1] > 1.5 * forwards[0], "a guided forward has two rows a sample"
    sharded = {"policy": chosen, "distributed": Distributed(shard="full")}
    load_objective(replace(says, **sharded))
    with pytest.raises(UserError) as caught:
        load_objective(replace(silent, **sharded))
    assert str(caught.value) == (
        f"distributed.shard full: objective '{__name__}:Outside' does not declare that it runs with sharded weights; "
        "see `shardable` in docs/objectives.md"
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"objective": "ppo"}, f"no objective 'ppo': name one of {', '.join(BUILT_IN)}, or your own as "),
        ({"objective": "nowhere:Mine"}, "objective 'nowhere:Mine': no module 'nowhere' in the working folder or among"),
        (
            {"objective": "dgpo_fast.config.options:DGPO"},
            "objective 'dgpo_fast.config.options:DGPO' cannot be made: ValidationError: ",
        ),
        (
            {"objective": "dgpo_fast.config.reading:flat"},
            "objective 'dgpo_fast.config.reading:flat' is no dgpo_fast.objectives.Objective",
        ),
        (
            {"objective": f"{__name__}:made_by_a_function"},
            f"objective '{__name__}:made_by_a_function': its traits are asked before it is made: name the class, or",
        ),
        ({"objective": "flow_grpo"}, "objective 'flow_grpo' learns from the noise of the rollout's steps and rollout."),
        (
            {"objective": "flow_grpo", "rollout": Rollout(solver="euler", noise_level=0.7)},
            "objective 'flow_grpo' learns from the steps of its own policy and ema.switch_ema_ref 500 lets ",
        ),
        (
            {"objective": "flow_grpo", "data": Data(source="offline")},
            "data.source offline: objective 'flow_grpo' learns from the steps of its own rollouts",
        ),
    ],
)
def test_an_objective_that_cannot_be_is_refused_in_one_line(change: dict, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_objective(replace(Config(), **change))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
