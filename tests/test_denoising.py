"""What holds of every objective that regresses velocities: DiffusionNFT, AWM, RAM and CRD."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dgpo_fast.config.command_line import configure
from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.config.options import EMA, Config, Engine
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.distributed import BatchPart
from dgpo_fast.errors import UserError
from dgpo_fast.learning.ema import ramp
from dgpo_fast.objectives.advantages import advantages
from dgpo_fast.objectives.registry import load_objective
from tests.denoising_case import config_of
from tests.objective_case import GROUPS, SIZE, Case
from tests.objective_configs import assert_same, watched

WITHOUT_PULL = {"levels": "linear", "kl_weight": 0.0, "ema_weight": 0.0}
SYSTEMS = {
    "nft": config_of("nft"),
    "nft, one noise a group": config_of("nft", noise="group", levels="uniform"),
    "awm": config_of("awm"),
    "awm, clipped": config_of("awm", clip_range=0.01, ratio="mean", weighting="huber", kl_weight_worst=0.2),
    "awm, no pull": config_of("awm", **WITHOUT_PULL),
    "ram": config_of("ram"),
    "crd": config_of("crd", kl_guidance_scale=2.0),
    "crd, bce": config_of("crd", loss="bce", temperature=0.2, kl_weight=0.0, kl_weight_worst=0.0),
}


def case_of(system: str, folder: Path, **engine: bool) -> Case:
    """Three groups in forwards of 5 samples, with these savings and no others."""
    savings = Engine(**{"batch_timesteps": False, "skip_equal_groups": False, **engine})
    return Case(folder, replace(SYSTEMS[system], engine=savings))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_do_not_change_the_gradient(system: str, micro_batch: int, random_pipeline: Path) -> None:
    """One sample at a time, and more than a group: the whole batch's gradient and metrics, to 1e-5."""
    case = case_of(system, random_pipeline)
    assert_same(case.gradient(micro_batch), case.gradient(GROUPS * SIZE))


@pytest.mark.parametrize("system", SYSTEMS)
def test_levels_are_predicted_in_full_batches(system: str, random_pipeline: Path) -> None:
    """With `engine.batch_timesteps` the base gets the rows that it gets level by level, in batches of which only the
    last one is not full; what is learnt is the same."""
    one_by_one = watched(case_of(system, random_pipeline))
    together = watched(case_of(system, random_pipeline, batch_timesteps=True))
    assert_same(together, one_by_one)
    passes = 2 if SYSTEMS[system].awm.ratio == "mean" else 1
    rows, batch = together[2]["base"], 10  # those of a rollout's guided forward of 5 samples
    assert sum(rows) == sum(one_by_one[2]["base"])
    rows = rows[: len(rows) // passes]
    assert all(count == batch for count in rows[:-1]) and (not rows or rows[-1] <= batch)
    guided, needs_base = SYSTEMS[system].crd.kl_guidance_scale == 2.0, system not in ("awm, no pull", "crd, bce")
    assert sum(rows) == 3 * GROUPS * SIZE * needs_base * (1 + guided)


def learnt_in_parts(case: Case, edges: tuple[int, ...], micro_batch: int, *, padded: bool) -> tuple[Tensor, dict, list]:
    """Gradient and metrics of processes that hold the samples between `edges`, added up, and each one's rows."""
    whole, gradient, metrics, counts = case.batch, torch.zeros(()), {}, []  # type: ignore[var-annotated]
    for first, stop in pairwise(edges):
        part = BatchPart(first, GROUPS, SIZE, whole.advantage, edges=edges if padded else None)
        case.batch = whole.taken(torch.arange(first, stop), part)
        mine = watched(case, micro_batch)
        gradient = gradient + mine[0]
        counts.append(mine[2])
        for name, value in mine[1].items():
            metrics[name] = metrics.get(name, 0.0) + value
    case.batch = whole
    return gradient, metrics, counts


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("micro_batch", [3, 12])
def test_processes_learn_together_what_one_learns(system: str, micro_batch: int, random_pipeline: Path) -> None:
    """A process with two groups, one with a group, and one without a sample; with sharded weights, they make equally
    many forwards, and padding adds nothing. One group prefers nothing."""
    case = case_of(system, random_pipeline, batch_timesteps=True, skip_equal_groups=True)
    case.batch.advantage[SIZE : 2 * SIZE] = 0
    expected = case.gradient(micro_batch)
    edges = (0, 2 * SIZE, 3 * SIZE, 3 * SIZE)
    assert_same(learnt_in_parts(case, edges, micro_batch, padded=False), expected)
    *found, counts = learnt_in_parts(case, edges, micro_batch, padded=True)
    assert counts[0] == counts[1] == counts[2]
    if system == "awm, no pull":  # of processes in step, no group is left out: metrics are means over all
        assert float((found[0] - expected[0]).abs().max()) < 1e-5 * float(expected[0].abs().max())
    else:
        assert_same(tuple(found), expected)


def test_groups_that_prefer_nothing_are_left_out(random_pipeline: Path) -> None:
    """Of AWM, if no term holds the policy back: no forward is made of them, and what is learnt is the same."""
    found = {}
    for skip in (False, True):
        case = case_of("awm, no pull", random_pipeline, skip_equal_groups=skip)
        case.batch.advantage[SIZE : 2 * SIZE] = 0
        found[skip] = watched(case)
    assert_same(found[True], found[False])
    assert 3 * sum(found[True][2]["policy"]) == 2 * sum(found[False][2]["policy"])
    case.batch = replace(case.batch, advantage=torch.zeros(GROUPS * SIZE))
    gradient, metrics, rows = watched(case)
    assert gradient.abs().max() == 0 == float(metrics["loss"]) and not any(rows.values())


def test_noise_is_a_samples_own_or_its_groups(random_pipeline: Path) -> None:
    for noise, same in (("sample", False), ("group", True)):
        case = Case(random_pipeline, config_of("nft", noise=noise))
        objective = load_objective(case.config)
        case.models.load_behaviour(case.old)
        [first, *_] = objective._noised(case.batch, objective.drawn_levels(case.batch), case.models)
        noise_of = first.target_v + case.batch.x0
        assert torch.allclose(noise_of[0], noise_of[1], atol=1e-6) is same
        assert not torch.allclose(noise_of[0], noise_of[SIZE])
        sigma = first.sigma.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(first.inputs.x_t, (1 - sigma) * case.batch.x0 + sigma * noise_of)


def test_decays_grow_with_optimizer_steps() -> None:
    """The schedules of the releases, at some of their steps."""

    def decays(ema: EMA, steps: tuple[int, ...]) -> list[float]:
        settings = {"per_step": ema.old_decay_per_step, "largest": ema.old_decay_max}
        start = {"start": ema.old_decay_start, "delay": ema.old_decay_delay}
        return [ramp(step, **settings, **start) for step in steps]

    steps = (1, 75, 76, 200, 1000)
    cases = {
        "sd35m-geneval-nft": [0.001, 0.075, 0.076, 0.2, 0.5],
        "sd35m-ocr-nft": [0.0, 0.0, 0.0075, 0.9375, 0.999],
        "sd35m-geneval-awm": [0.001, 0.075, 0.076, 0.2, 0.3],
        "sd35m-geneval-ram": [0.01, 0.75, 0.76, 0.9, 0.9],
        "sd35m-ocr-crd": [0.255, 0.625, 0.63, 0.999, 0.999],
    }
    for recipe, expected in cases.items():
        assert decays(get_recipe(recipe).ema, steps) == pytest.approx(expected), recipe


def test_advantages_can_be_scaled_or_left_undivided() -> None:
    rewards = np.array([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]])
    assert advantages(rewards, Advantage(std="off", clamp=None)).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    clamped = advantages(rewards, Advantage(std="off", clamp=2.0, scale=0.25))
    assert clamped.tolist() == [-0.5, -0.25, 0.5, 0.0, 0.0, 0.0] and Advantage(clamp=2.0, scale=0.25).bound == 0.5


WRONG = {
    "tiny-shapes-nft --advantage.clamp none": "advantage.clamp is none but objective nft maps [−clamp, clamp] to "
    "[0, 1]: give a number, as --advantage.clamp 5",
    "tiny-shapes-crd --advantage.clamp none": "advantage.clamp is none but objective crd maps [−clamp, clamp] to "
    "[0, 1]: give a number, as --advantage.clamp 5",
    "tiny-shapes-awm --awm.kl-weight-worst 1 --advantage.clamp none": "advantage.clamp is none but objective awm maps "
    "[−clamp, clamp] to [0, 1]: give a number, as --advantage.clamp 5",
    "tiny-shapes-crd --crd.temperature -1": "crd.temperature: input should be greater than or equal to 0, not '-1'",
    "tiny-shapes-nft --nft.timesteps 8": "nft.timesteps is 8 but only 7 timesteps can be drawn "
    "(rollout.num_inference_steps, nft.levels): lower it or raise those",
    "tiny-shapes-awm --awm.timesteps 7": "awm.timesteps is 7 but only 6 timesteps can be drawn "
    "(rollout.num_inference_steps, awm.levels): lower it or raise those",
    "tiny-shapes-nft --nft.levels linear --nft.timesteps none": "nft.timesteps is none but nft.levels linear has no "
    "end: give a number, as 4",
    "tiny-shapes --ema.rollout-decay-per-step 0.01": "ema.rollout_decay_per_step is 0.01 and ema.switch_ema_ref is "
    "500: only one average can draw the rollouts; use --ema.switch-ema-ref none",
}


@pytest.mark.parametrize("line", WRONG)
def test_settings_that_do_not_go_together_are_refused_in_one_line(line: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(line.split())
    assert str(caught.value) == f"command line: {WRONG[line]}"


def with_ema(recipe: str, **ema: object) -> Config:
    config = get_recipe(recipe)
    return replace(config, ema=replace(config.ema, **ema))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            with_ema("tiny-shapes-nft", switch_ema_ref=500),
            "objective 'nft' learns from the images of θ_old and ema.switch_ema_ref 500 lets the policy draw them: use "
            "--ema.switch-ema-ref 0",
        ),
        (
            with_ema("tiny-shapes-ram", switch_ema_ref=None),
            "objective 'ram' learns from the images of θ_old and ema.switch_ema_ref none lets the policy draw them: "
            "use --ema.switch-ema-ref 0",
        ),
        (
            with_ema("tiny-shapes-awm", switch_ema_ref=500),
            "objective 'awm' learns from the images of its own policy and ema.switch_ema_ref 500 lets its average draw "
            "them later: use --ema.switch-ema-ref none",
        ),
        (
            replace(get_recipe("tiny-shapes-awm"), awm=config_of("awm", clip_range=0.1).awm),
            "objective 'awm' learns from the images of θ_old and ema.switch_ema_ref none lets the policy draw them: "
            "use --ema.switch-ema-ref 0",
        ),
        (
            replace(get_recipe("tiny-shapes-nft"), nft=config_of("nft", levels="logit_normal").nft),
            "nft.levels logit_normal shifts levels as the rollout's grid, and rollout.shift is none: give one",
        ),
        (
            with_ema("tiny-shapes-awm", rollout_decay_per_step=0.5),
            "objective 'awm' learns from the images of its own policy and ema.rollout_decay_per_step 0.5 lets another "
            "average draw them: use --ema.rollout-decay-per-step none",
        ),
    ],
)
def test_what_an_objective_cannot_run_with_is_refused(config: Config, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_objective(config)
    assert str(caught.value) == line
