"""Flow-GRPO in its later forms: windows of noisy steps, other noise, other ratios, some of the steps."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dgpo_kernels import philox_normal

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Rollout
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Guidance
from dgpo_fast.objectives.flow_grpo import FlowGRPOObjective
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.noisy_steps import NoiseWindow, noisy_steps
from dgpo_fast.rollout.sampler import sample_latents
from dgpo_fast.rollout.schedule import _constant_steps, _preserving_steps, make_schedule
from dgpo_fast.rollout.step_noise import StepNoise, gaussian_log_prob
from dgpo_fast.seeds import stream_seed
from tests.objective_case import GROUPS, SIZE, Case
from tests.objective_configs import grpo_case, grpo_config

GRID = [1.0, 0.8, 0.5, 0.0]
RATIOS = ("gaussian", "squared", "guard")


def drawn_case(folder: Path, kind: str = "sde", on_policy: bool = False, **flow_grpo: object) -> Case:
    """Groups drawn with the noise that a run of the case's configuration draws."""
    config = grpo_config(kl_weight=0.0, **flow_grpo)
    config = replace(config, rollout=replace(config.rollout, noise_kind=kind))
    case = Case(folder, config)
    if on_policy:
        case.models.load_weights(case.old)
    rollout = config.rollout
    schedule = make_schedule("euler", rollout.num_inference_steps, 3.0, 0.7, noise_kind=kind)
    case.models.load_behaviour(case.old)
    noise = StepNoise(case.batch.sample_index, seed=stream_seed(0, "step noise"), draw=case.batch.iteration, keep=True)
    draw = Draw(schedule, Guidance(rollout.guidance_scale), batch_size=GROUPS * SIZE)
    x0 = sample_latents(case.models.behaviour, case.batch.x0, case.batch.text, draw, step_noise=noise)
    case.batch = replace(case.batch, x0=x0, schedule=schedule, transitions=noise.transitions)
    return case


def test_a_window_of_all_steps_is_flow_grpo(random_pipeline: Path) -> None:
    """To the last bit."""
    case = grpo_case(random_pipeline, clip_range=0.02, kl_weight=0.04)
    whole, _ = case.gradient(micro_batch=5)
    case.config = replace(case.config, rollout=replace(case.config.rollout, noise_steps=5))
    assert torch.equal(case.gradient(micro_batch=5)[0], whole)


def test_steps_without_noise_are_eulers() -> None:
    """No noise level: the coefficients of the ODE."""
    for steps in (_preserving_steps, _constant_steps):
        drift, noise = steps(GRID, 0.0)
        assert [row[0] for row in drift] == pytest.approx([-0.2, -0.3, -0.5])
        assert torch.tensor(noise).abs().max() == pytest.approx(0, abs=1e-15)


def test_constant_noise_by_hand() -> None:
    """σ = 0.8 → 0.5 with s = 0.3: s²/(2σ) = 0.05625, dt = −0.3."""
    drift, noise = _constant_steps(GRID, 0.3)
    assert drift[1] == pytest.approx([(1 + 0.05625 * 0.2) * -0.3])
    assert noise[1] == pytest.approx([0.05625 * -0.3, 0.3 * math.sqrt(0.3)])


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_preserving_steps_keep_the_grids_noise_level(level: float) -> None:
    """With the true velocity, x' − (1 − σ')·x0 is normal noise of the size σ'."""
    generator = torch.manual_seed(0)
    x0, eps, z = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(3))
    drift, noise = _preserving_steps(GRID, level)
    for step in range(3):
        sigma, after = GRID[step : step + 2]
        x = (1 - sigma) * x0 + sigma * eps
        moved = x + drift[step][0] * (eps - x0) + noise[step][0] * x + noise[step][1] * z
        left = moved - (1 - after) * x0
        assert float(left.std()) == pytest.approx(after, rel=0.01, abs=1e-9)
        assert noise[step][1] == pytest.approx(after * math.sin(level * math.pi / 2))


@pytest.mark.parametrize("kind", ["sde", "constant", "cps"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_ratio_is_1_on_policy(ratio: str, kind: str, random_pipeline: Path) -> None:
    case = drawn_case(random_pipeline, kind, on_policy=True, ratio=ratio)
    _, metrics = case.gradient(micro_batch=GROUPS * SIZE)
    assert float(metrics["ratio_deviation"]) < 2e-5


def test_guard_is_the_ratio_without_its_bias(random_pipeline: Path) -> None:
    """mean (z·Δμ) is κ times the difference of log-probabilities plus mean Δμ²/(2κ²), and linear in Δμ."""
    case = drawn_case(random_pipeline, ratio="guard")
    batch, objective = case.batch, FlowGRPOObjective(case.config)
    std, after = batch.schedule.noise[2, 1], batch.transitions.states[3]
    seed, draw = stream_seed(0, "step noise"), batch.iteration * batch.schedule.steps + 2
    z = philox_normal(tuple(after.shape[1:]), batch.sample_index, seed=seed, draw=draw)
    old, change = after - std * z, 0.01 * torch.randn(after.shape, generator=torch.manual_seed(1))
    found = objective._log_ratio(batch, 2, old + change)
    moved = gaussian_log_prob((after - old - change) / std, std) - gaussian_log_prob(z, std)
    expected = std * (moved + change.square().flatten(1).mean(1) / (2 * std**2))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(objective._log_ratio(batch, 2, old + 2 * change), 2 * found, rtol=1e-3, atol=1e-7)


def test_ratios_are_weights_of_steps(random_pipeline: Path) -> None:
    """At the first update, the gradients of a step are proportional: 1/κ for the Gaussian's, 1/dt for the guard's, and
    2·κ for the squared one."""
    gradients: dict[str, list[torch.Tensor]] = {}
    case = drawn_case(random_pipeline, on_policy=True, clip_range=1e9)
    noise, sigmas = case.batch.schedule.noise, case.batch.schedule.sigmas
    for ratio in RATIOS:
        case.config = replace(case.config, flow_grpo=replace(case.config.flow_grpo, ratio=ratio))
        gradients[ratio] = []
        for step in (1, 3):
            objective = FlowGRPOObjective(case.config)
            objective._trained_steps = lambda _, step=step: [step]  # type: ignore[method-assign]
            for weight in case.models.weights.values():
                weight.grad = None
            objective.accumulate(case.batch, case.models, case.old)
            gradients[ratio].append(torch.cat([w.grad.flatten() for w in case.models.weights.values()]))
    for place, step in enumerate((1, 3)):
        std, dt = noise[step, 1], sigmas[step] - sigmas[step + 1]
        plain = std * gradients["gaussian"][place]
        for ratio, factor in (("guard", 1 / dt), ("squared", 2 * std)):
            found = gradients[ratio][place]
            assert torch.linalg.norm(found - factor * plain) < 1e-3 * torch.linalg.norm(found), ratio


def test_a_window_lies_among_the_first_steps_and_moves() -> None:
    rollout = Rollout(solver="euler", noise_level=0.8, num_inference_steps=10, noise_steps=3, noise_among=7)
    starts = [noisy_steps(rollout, 0, number).start for number in range(300)]
    assert set(starts) == set(range(5)) and all(len(noisy_steps(rollout, 0, n)) == 3 for n in range(9))
    assert starts[:50] == [noisy_steps(rollout, 0, number).start for number in range(50)]
    assert noisy_steps(replace(rollout, noise_steps=None), 0, 3) == range(7)
    assert noisy_steps(replace(rollout, noise_steps=None, noise_among=None), 0, 3) == range(9)


def test_outside_of_the_window_a_rollout_is_the_ode(workspace: Path) -> None:
    """States change in their window by noise, elsewhere as Euler's steps; the next window undoes the one before."""
    grpo = ["--objective", "flow_grpo", "--ema.switch-ema-ref", "none", "--rollout.noise-steps", "1"]
    noise = ["--rollout.solver", "euler", "--rollout.noise-level", "0.7", "--rollout.guidance-scale", "1"]
    parts = build(configure(["small.yaml", *grpo, *noise]))
    schedule, config = parts.draw.schedule, parts.config
    ode, sde = make_schedule("euler", 4, 3.0), make_schedule("euler", 4, 3.0, 0.7)
    window: Any = parts.source.worker.noise.window  # type: ignore[attr-defined]
    assert isinstance(window, NoiseWindow)
    for number in (0, 1, 2, 3, 2):
        window.place(number)
        [inside] = noisy_steps(config.rollout, config.seed, number)
        for step in range(4):
            source = sde if step == inside else ode
            assert torch.equal(schedule.coefficients[step], source.coefficients[step])
            assert bool(schedule.noise[step, 1] > 0) is (step == inside)
    parts.reward_pool.close()


def test_groups_may_start_from_one_noise(workspace: Path) -> None:
    """Then the noise of their steps alone makes them different."""
    grpo = ["--objective", "flow_grpo", "--ema.switch-ema-ref", "none", "--rollout.share-initial-noise"]
    noise = ["--rollout.solver", "euler", "--rollout.noise-level", "0.7", "--rollout.noise-kind", "constant"]
    parts = build(configure(["small.yaml", *grpo, *noise]))
    groups = parts.source.collect(0)[0]
    states = groups.transitions.states
    size = parts.config.rollout.group_size
    assert torch.equal(states[0, 0], states[0, size - 1]) and not torch.equal(states[0, 0], states[0, size])
    assert not torch.equal(states[1, 0], states[1, 1])
    parts.reward_pool.close()


def test_some_of_the_steps_are_trained(random_pipeline: Path) -> None:
    """As many as asked for, all different, others in another iteration; all together they are the whole."""
    case = grpo_case(random_pipeline, kl_weight=0.0, steps=3)
    objective = FlowGRPOObjective(case.config)
    chosen = [objective._trained_steps(iteration) for iteration in range(40)]
    assert all(len(set(steps)) == 3 for steps in chosen) and {s for steps in chosen for s in steps} == set(range(5))
    assert objective.needs.levels_at_once == 3


WRONG = {
    "--rollout.noise-steps 3": "rollout.noise_steps is 3 but rollout.noise_level is 0: give it some, as in "
    "--rollout.solver euler --rollout.noise-level 0.7",
    "--rollout.share-initial-noise": "rollout.share_initial_noise is true but rollout.noise_level is 0: give it some, "
    "as in --rollout.solver euler --rollout.noise-level 0.7",
    "--rollout.solver euler --rollout.noise-level 2 --rollout.noise-kind cps": "rollout.noise_level is 2 but "
    "rollout.noise_kind cps takes at most 1, where all noise is replaced: lower it",
    "--rollout.solver euler --rollout.noise-level 0.7 --rollout.noise-among 8": "rollout.noise_among is 8 but the last "
    "of 8 steps is not learned from: use at most 7, or raise rollout.num_inference_steps",
    "--rollout.solver euler --rollout.noise-level 0.7 --rollout.noise-steps 4 --rollout.noise-among 3": "rollout."
    "noise_steps is 4 but the steps with noise lie among the first 3 (rollout.noise_among): lower it or raise that",
    "--objective flow_grpo --rollout.solver euler --rollout.noise-level 0.7 --rollout.noise-steps 3 "
    "--flow-grpo.steps 4": "flow_grpo.steps is 4 but only 3 steps have noise that can be learned from "
    "(rollout.noise_steps, rollout.noise_among): lower it or raise those",
}


@pytest.mark.parametrize("line", WRONG)
def test_settings_that_do_not_go_together_are_refused_in_one_line(line: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(line.split())
    assert str(caught.value) == f"command line: {WRONG[line]}"
