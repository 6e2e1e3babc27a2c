"""The comparison: fair plans, curves and findings by hand, what is measured beside the reward, and the command."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from benchmarks.compare import settings as settings_of_compare
from benchmarks.compare import workers
from benchmarks.compare.__main__ import compare
from benchmarks.compare.curves import curve, mean_interval
from benchmarks.compare.findings import Findings
from benchmarks.compare.plan import (
    LR_STEP,
    OWN_STEP,
    Plan,
    choose,
    draw_run,
    finished_seeds,
    fitted,
    from_json,
    next_run,
    to_json,
)
from benchmarks.compare.quality import PatchBank, diversity, rendered, sharpness
from benchmarks.compare.report import update_document, write_report
from benchmarks.compare.rivals import Rivals
from benchmarks.compare.run import Run, finished_result, perform
from benchmarks.compare.studies import STUDIES
from benchmarks.compare.systems import NORMAL, QUICK, SYSTEMS, configuration
from dgpo_fast.config.reading import flat
from dgpo_fast.errors import UserError
from dgpo_fast.tiny import data
from tests.processes import CONTEXT, PythonProcess
from tests.servers import wait_for

ALL = STUDIES["paper"].systems


def make_plan(systems: tuple[str, ...] = ALL, seeds: int = 3, trials: int = 5, study: str = "paper") -> Plan:
    return Plan(study, systems, seeds, trials, final_s=100.0, marks=(0.5, 1.0), groups=16)


def result(run: Run, reward: float, patch: float = 4.0, **more: Any) -> dict[str, Any]:
    """What a run would have written that rises from 0.5 to `reward` at half its time, and stays there."""
    if run.kind == "draw":
        return {"run": asdict(run), "source": "offline", "drawing_s": 10.0, "drawing_forwards": 80}
    points = [
        {
            "iteration": round(10 * mark),
            "training_s": mark * run.seconds,
            "training_wall_s": mark * run.seconds,
            "trained_images": round(100 * mark),
            "training_forwards": 1000.0 * mark,
            "distance": 0.01 * mark,
            "sharpness": 30.0,
            "reward_mean": reward,
            "reward_ci95": [reward - 0.1, reward + 0.1],
            "patch_distance": patch,
        }
        for mark in run.marks
    ]
    return {
        "run": asdict(run),
        "points": points,
        "failure": None,
        "out_of_task": {"diversity": 50.0, "signs": 0.3},
        "source": {"drawing_s": 0.0, "drawing_forwards": 0},
        **more,
    }


def carry_out(plan: Plan, reward: Any = lambda run: 0.6) -> tuple[list[Run], dict[str, dict]]:
    """All runs in the order in which one process would do them, and their results."""
    order: list[Run] = []
    results: dict[str, dict] = {}
    while (run := next_run(plan, results, set())) is not None:
        order.append(run)
        results[run.name] = result(run, reward(run))
    return order, results


@settings(deadline=None, max_examples=20)
@given(st.sets(st.sampled_from(ALL), min_size=1), st.integers(1, 4), st.integers(1, 7), st.integers(0, 999))
def test_every_system_gets_the_same(systems: set[str], seeds: int, trials: int, seed: int) -> None:
    """As many settings tried, as many final runs, the same seconds times patience, whatever the scores are."""
    plan, rng = make_plan(tuple(s for s in ALL if s in systems), seeds, trials), np.random.default_rng(seed)
    order, results = carry_out(plan, lambda run: rng.random())
    assert len(order) == plan.size == len({run.name for run in order})
    for system in plan.systems:
        mine = [run for run in order if run.system == system and run.kind != "draw"]
        searched, final = ([run for run in mine if run.kind == kind] for kind in ("search", "final"))
        assert len(searched) == trials and {run.seconds for run in searched} == {40.0 * plan.patience(system)}
        seconds = 100.0 * plan.patience(system)
        assert [run.seed for run in final] == list(range(seeds)) and {run.seconds for run in final} == {seconds}
        assert not {run.seed for run in searched} & {run.seed for run in final}, "tuned on another seed"
        assert mine.index(final[0]) == trials, "tuned before the final runs"
        best = max(searched, key=lambda run: results[run.name]["points"][-1]["reward_mean"])
        assert {(run.lr, run.groups, run.factor) for run in final} == {(best.lr, best.groups, best.factor)}
    assert sum(run.seconds for run in order) == pytest.approx(plan.training_s)
    assert finished_seeds(plan, results) == seeds
    results.pop(order[-1].name)
    assert finished_seeds(plan, results) == seeds - 1


def test_systems_differ_in_what_they_are_and_in_nothing_else() -> None:
    """Model, rollouts, evaluation, optimizer, trained weights: the same but for the settings that name the system."""
    old = {"ema.old_decay_per_step", "ema.old_decay_max", "ema.switch_ema_ref"}
    average = {"ema.rollout_decay_per_step", "ema.rollout_decay_delay"}
    own = {
        "nft": {"objective", "nft.timesteps"} | old,
        "awm": {"objective", "awm.timesteps", "advantage.scale"} | old,
        "ram": {"objective", "ram.timesteps", "advantage.std", "advantage.clamp"} | old,
        "crd": {"objective", "crd.timesteps", "ema.old_decay_start"} | old | average,
        "dgpo-offline": {"data.source"},
        "dpo": {"objective", "diffusion_dpo.beta"},
        "dpo-offline": {"objective", "diffusion_dpo.beta", "data.source"},
        "flow-grpo": {
            "objective",
            "rollout.solver",
            "rollout.noise_level",
            "ema.switch_ema_ref",
            "flow_grpo.clip_range",
        },
        "dgpo-sde": {"rollout.solver", "rollout.noise_level"},
        "dgpo-no-clip": {"dgpo.high_noise_steps"},
        "dgpo-high-noise": {"dgpo.lowest_sigma"},
        "dgpo-all-noise": {"dgpo.lowest_sigma"},
        "dgpo-half": {"advantage.keep"},
        "dgpo-quarter": {"advantage.keep"},
        "dgpo-half-drawn": {"advantage.keep", "advantage.keep_by"},
    }
    own["flow-grpo-fast"] = own["flow-grpo"] | {"rollout.noise_kind", "rollout.noise_steps", "advantage.std"}
    own["flow-grpo-fast"] |= {"flow_grpo.ratio", "flow_grpo.kl_weight"}
    asked: dict[str, Any] = {"lr": 1e-4, "groups": 4, "seed": 3, "evaluation_seed": 1, "device": "cpu"}
    assert set(own) | {"dgpo"} == set(SYSTEMS)
    for scale in (QUICK, NORMAL):
        dgpo = flat(configuration(SYSTEMS["dgpo"], scale, **asked))
        for name, expected in own.items():
            settings_of = flat(configuration(SYSTEMS[name], scale, **asked))
            assert {key for key in dgpo if settings_of[key] != dgpo[key]} <= expected | {"recipe"}, name


def test_a_system_has_one_setting_of_its_own_in_the_search() -> None:
    """The one that it names, times the factor; it is one of its objective, or of the loss that it is an ablation of."""
    asked: dict[str, Any] = {"lr": 1e-4, "groups": 4, "seed": 3, "evaluation_seed": 1, "device": "cpu"}
    for system in SYSTEMS.values():
        before, after = (flat(configuration(system, NORMAL, **asked, factor=factor)) for factor in (1.0, OWN_STEP))
        assert {key for key in before if before[key] != after[key]} == {system.own}
        assert after[system.own] == pytest.approx(OWN_STEP * before[system.own])
        assert system.own.split(".")[0] == system.recipe().objective


def test_every_study_has_its_systems() -> None:
    """Known ones, each once; the settings' help names every study."""
    told = Path(settings_of_compare.__file__).read_text(encoding="utf-8")
    for name, study in STUDIES.items():
        assert study.name == name and len(set(study.systems)) == len(study.systems) > 1
        assert set(study.systems) <= set(SYSTEMS) and set(study.patience) <= set(study.systems)
        assert name in told


def test_a_trial_that_failed_is_not_chosen() -> None:
    plan = make_plan(("dgpo",), trials=3)
    order, results = carry_out(plan, lambda run: run.lr)
    best = choose(plan, "dgpo", results)
    assert best is not None and best.lr == max(run.lr for run in order)
    results[best.name]["failure"] = "the gradient is not finite"
    second = choose(plan, "dgpo", results)
    assert second is not None and second.lr < best.lr


def test_later_trials_go_on_from_the_best_one() -> None:
    """A learning rate beyond the three where the best one is at their edge, and then half the groups. Else half the
    groups, and then a quarter where half were better, or twice as many where not."""
    plan, centre = make_plan(("dgpo",)), SYSTEMS["dgpo"].lr
    for sign, expected in ((1, centre * LR_STEP**2), (-1, centre / LR_STEP**2)):
        order, _ = carry_out(plan, lambda run, sign=sign: sign * run.lr)
        assert (order[3].lr, order[3].groups) == (pytest.approx(expected), plan.groups)
        assert (order[4].lr, order[4].groups) == (order[3].lr, plan.groups // 2)
    for better, fifth in ((-1, plan.groups // 4), (1, 2 * plan.groups)):
        order, _ = carry_out(plan, lambda run, better=better: -abs(run.lr - centre) + 1e-9 * better * run.groups)
        assert (order[3].lr, order[3].groups) == (centre, plan.groups // 2)
        assert (order[4].lr, order[4].groups) == (centre, fifth)


def test_the_last_trials_move_the_systems_own_setting() -> None:
    """From the best of the others, a factor up and down; the best of all is chosen, and its runs have names of their
    own."""
    plan = make_plan(("nft",), trials=7)
    order, results = carry_out(plan, lambda run: run.groups + run.lr - abs(run.factor - 1 / OWN_STEP))
    before = max(order[:5], key=lambda run: run.groups + run.lr)
    assert [(run.factor, run.lr, run.groups) for run in order[5:7]] == [
        (factor, before.lr, before.groups) for factor in (OWN_STEP, 1 / OWN_STEP)
    ]
    assert order[6].name.endswith("-own0.25-seed1000")
    chosen = choose(plan, "nft", results)
    assert chosen == order[6] and {run.factor for run in order[7:]} == {1 / OWN_STEP}


def test_offline_runs_wait_for_their_data() -> None:
    plan = make_plan(("dgpo-offline", "dpo-offline"), seeds=1)
    draws = {draw_run(seed, 16).name for seed in (0, 1000)}
    assert next_run(plan, {}, draws) is None, "both draws are under way: nothing else can start"
    run = next_run(plan, {draw_run(1000, 16).name: {}}, draws)
    assert run is not None and (run.kind, run.system) == ("search", "dgpo-offline")


@settings(deadline=None, max_examples=40)
@given(st.floats(1, 500), st.integers(1, 4), st.floats(0.1, 20), st.floats(0.1, 20))
def test_the_plan_fits_into_its_minutes(minutes: float, processes: int, evaluation_s: float, set_up_s: float) -> None:
    base = {"set_up_s": set_up_s, "evaluation_s": evaluation_s, "out_of_task_s": 2 * evaluation_s}
    plan = make_plan()
    try:
        plan = fitted(plan, 60 * minutes, processes, base, draw_s=30.0)
    except UserError as error:
        assert "leaves no time to train: give at least" in str(error)
        least = float(str(error).rsplit(" ", 1)[1])
        assert fitted(plan, 60 * 1.06 * least, processes, base, draw_s=30.0).final_s >= 1
        return
    order, _ = carry_out(plan)
    seconds = sum(run.seconds + set_up_s + evaluation_s * len(run.marks) for run in order)
    seconds += sum(30 for run in order if run.kind == "draw") + 21 * base["out_of_task_s"]
    assert 0.9 * 60 * minutes * processes < seconds <= 60 * minutes * processes
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


def test_mean_interval_by_hand() -> None:
    """Three values: mean ± 4.3027·s/√3."""
    assert mean_interval([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 4.302653 * np.sqrt(7 / 3) / np.sqrt(3)))
    assert np.isnan(mean_interval([1.0])[1])


def test_curve_by_hand() -> None:
    """0.5 until the data is drawn at 20 s, then a line to 0.7 at 60 s, where it stays."""
    run = {
        "source": {"drawing_s": 20.0, "drawing_forwards": 0},
        "points": [{"training_s": 60.0, "reward_mean": 0.7}, {"training_s": 120.0, "reward_mean": 0.7}],
    }
    line = curve([run, run], {"reward_mean": 0.5}, "reward_mean", "training_s", until=120.0)
    at = dict(zip(line.x.round(1).tolist(), line.mean.tolist(), strict=True))
    assert [at[s] for s in (0.0, 20.0, 40.0, 60.0, 120.0)] == pytest.approx([0.5, 0.5, 0.6, 0.7, 0.7])
    assert line.reaches(0.6) == pytest.approx(40.0, abs=0.5) and line.reaches(0.71) is None
    assert line.best() == (60.0, pytest.approx(0.7)) and line.half.max() == 0


def final_runs(rewards: dict[str, list[float]], patch: dict[str, list[float]] | None = None) -> dict[str, list[dict]]:
    """Final runs of 100 s that rise at once to these rewards, one a seed."""
    runs: dict[str, list[dict]] = {}
    for system, values in rewards.items():
        patches = (patch or {}).get(system, [4.0] * len(values))
        for seed, (reward, distance) in enumerate(zip(values, patches, strict=True)):
            run = Run("final", system, seed, 1e-4, 16, 100.0, (0.02, 1.0))
            runs.setdefault(system, []).append(result(run, reward, distance))
    return runs


BASE = {"reward_mean": 0.5, "patch_distance": 4.0, "sharpness": 30.0, "distance": 0.0}


def test_a_distance_that_falls_again_counts_once() -> None:
    """0.1, 0.3, 0.2, 0.4 from the base: the reward at 0.35 is between those where the run first was at 0.3 and 0.4."""
    distances, rewards = (0.1, 0.3, 0.2, 0.4), (0.6, 0.7, 0.9, 0.8)
    run = {"points": [{"distance": d, "reward_mean": r} for d, r in zip(distances, rewards, strict=True)]}
    line = curve([run], BASE, "reward_mean", "distance", until=0.4)
    at_some = np.interp([0.05, 0.2, 0.35], line.x, line.mean)
    assert at_some == pytest.approx([0.55, 0.65, 0.75])


def rival_runs(rewards: dict[str, list[float]], spent: dict[str, tuple[float, float, float]]) -> dict[str, list[dict]]:
    """Runs that rise in a line to `rewards`, with `spent` seconds, forwards and distance at their end."""
    runs = final_runs(rewards)
    for system, results in runs.items():
        seconds, forwards, distance = spent[system]
        for each in results:
            each["run"]["seconds"] = 100.0
            each["points"] = each["points"][-1:]
            each["points"][0] |= {"training_s": seconds, "training_forwards": forwards, "distance": distance}
    return runs


def test_rivals_are_compared_at_equal_budgets_and_distance() -> None:
    """By hand: at 100 s both are at their ends. DGPO made 1000 forwards, the other 2000, and has half its gain after
    1000. DGPO came to a distance of 0.04, the other to 0.02, where DGPO has half its gain."""
    runs = rival_runs(
        {"dgpo": [0.70, 0.71, 0.69], "nft": [0.64, 0.65, 0.66]},
        {"dgpo": (100.0, 1000.0, 0.04), "nft": (100.0, 2000.0, 0.02)},
    )
    rivals = Rivals(runs, BASE)
    seconds, forwards, pair = rivals.findings()
    assert (seconds.verdict, forwards.verdict, pair.verdict) == ("DGPO", "DGPO", "DGPO is ahead")
    assert seconds.sentence.startswith("After 100 s: DGPO 0.700, DiffusionNFT 0.650 (the base: 0.500)")
    assert seconds.sentence.endswith("DGPO is apart from each of the others.")
    assert pair.numbers["training_s"]["difference"] == pytest.approx(mean_interval([0.06, 0.06, 0.03]))
    at_forwards = [0.7 - 0.57, 0.71 - 0.575, 0.69 - 0.58]
    assert pair.numbers["training_forwards"]["difference"] == pytest.approx(mean_interval(at_forwards))
    at_distance = [0.6 - 0.64, 0.605 - 0.65, 0.595 - 0.66]
    assert pair.numbers["distance"]["difference"] == pytest.approx(mean_interval(at_distance))
    assert "-0.050 ± 0.033 after a distance of 0.02 from the base" in pair.sentence
    table = rivals.table().splitlines()
    assert "| reward after 100 s | reward after 1 thousand forwards | reward after a distance of 0.03 from" in table[0]
    assert table[2].startswith("| DGPO | 0.700 ± 0.025 | 0.700 ± 0.025 | 0.650")
    assert table[3].endswith("| not reached |")


def test_nobody_wins_by_noise() -> None:
    runs = rival_runs(
        {"dgpo": [0.60, 0.75, 0.66], "nft": [0.7, 0.69, 0.71]}, dict.fromkeys(("dgpo", "nft"), (100.0, 1.0, 1.0))
    )
    seconds, _, pair = Rivals(runs, BASE).findings()
    assert (seconds.verdict, pair.verdict) == ("open", "open")
    assert "Not apart from the first: DGPO (+0.030 ± " in seconds.sentence


def test_findings_say_what_the_numbers_are() -> None:
    """Flow-GRPO rises to 0.6 over 100 s and DGPO to 0.8 over 20: at 5 s of the way it is 20 times sooner."""
    runs = final_runs({"dgpo": [0.8, 0.8, 0.8], "flow-grpo": [0.6, 0.6, 0.6], "dpo": [0.7, 0.71, 0.69]})
    for run in runs["dgpo"]:
        run["points"][0] |= {"training_s": 20.0, "reward_mean": 0.8}
        run["points"][1] |= {"reward_mean": 0.8}
    for run in runs["flow-grpo"]:
        run["points"][0] |= {"training_s": 50.0, "reward_mean": 0.55}
    found = {finding.claim: finding for finding in Findings(runs, BASE).all()}
    speed = next(finding for claim, finding in found.items() if "sooner" in claim)
    assert speed.numbers["ratio"] == pytest.approx(100 / 6.67, rel=0.05)
    assert speed.verdict == "holds" and "15.0 times sooner" in speed.sentence
    # By then Flow-GRPO has seen 100 images. DGPO sees its first 2 by the end of its rise: a third of the way is 0.67.
    assert speed.numbers["ratio_in_images"] == pytest.approx(100 / 0.67, rel=0.3)
    assert speed.numbers["flow_grpo_after_dgpos_time"] == pytest.approx(0.6)
    pairs = found["groups beat pairs, online"]
    assert pairs.verdict == "holds" and pairs.numbers["difference"] == pytest.approx(0.1)
    assert "DGPO ends at 0.800, Diffusion-DPO at 0.700: a difference of +0.100 ± 0.025" in pairs.sentence


def test_findings_are_honest_about_what_does_not_hold() -> None:
    open_, against = [0.60, 0.75, 0.66], [0.7, 0.69, 0.71]
    runs = final_runs(
        {
            "dgpo": [0.6, 0.6, 0.6],
            "dgpo-sde": against,
            "dgpo-offline": open_,
            "flow-grpo": [0.65] * 3,
            "dgpo-no-clip": [0.6] * 3,
        },
        {"dgpo": [4.0, 4.1, 4.2], "dgpo-no-clip": [6.0, 6.2, 6.1]},
    )
    found = {finding.claim: finding for finding in Findings(runs, BASE).all()}
    assert found["ODE rollouts beat SDE rollouts"].verdict == "does not hold"
    assert found["online data beat offline data"].verdict == "open"
    speed = next(finding for claim, finding in found.items() if "sooner" in claim)
    assert speed.verdict == "does not hold" and "DGPO did not reach it in 100 s" in speed.sentence
    clip = found["the timestep clip protects image quality"]
    assert clip.verdict == "holds" and "+2.00 ± 0.25 grey levels" in clip.sentence
    assert "the share of signs that are read is +0.000 ± 0.000 higher, and the reward +0.000 ± 0.000." in clip.sentence


def test_no_improvement_is_nothing_to_reach() -> None:
    runs = final_runs({"dgpo": [0.6] * 3, "flow-grpo": [0.45] * 3})
    [speed] = Findings(runs, BASE).all()
    assert speed.verdict == "open" and "nothing to reach" in speed.sentence


def test_the_report(tmp_path: Path) -> None:
    """Tables hold the runs' numbers, every figure is there, and a document's marked parts are replaced alone."""
    plan = make_plan(("dgpo", "dgpo-sde"), trials=2, study="four-steps")
    _, results = carry_out(plan, lambda run: 0.6 + run.lr * 100 + 0.01 * (run.seed % 7))
    base = {
        "points": [{**BASE, "iteration": 0}],
        "out_of_task": {"diversity": 51.0, "signs": 0.2},
        "rendered_pictures": {"patch_distance": 0.8, "sharpness": 40.0},
    }
    machine = {"device": "A processor", "kind": "cpu", "cpu_count": 2, "processes": 2, "torch": "2", "commit": "abc"}
    machine |= {"date": "2026-01-01", "wall_s": 5400.0}
    write_report(plan, results, base, machine, tmp_path)
    expected = {"compare.json", "equal.md", "table.md", "search.md", "findings.md", "about.md", "ode_sde.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    table = (tmp_path / "table.md").read_text()
    assert (
        "| DGPO | 100 s | 1 thousand | 0.660 ± 0.025 | 0.0100 ± 0.0000 | 4.00 ± 0.00 | 30.0 ± 0.0 | 50.0 ± 0.0 | "
        "0.300 ± 0.000 | 10 | 100 | 0.0005, 16, beta 30 |"
    ) in table
    about = (tmp_path / "about.md").read_text()
    assert "All of it took 90 minutes on the wall" in about
    # A search of 40 s and a final run of 100 s, of 1000 forwards each.
    assert "took up to 2.50 times as many of these seconds in one run as in another" in about
    assert "| DGPO | 0.0005, 16, beta 30 | 10 | 0.710 | chosen |" in (tmp_path / "search.md").read_text()
    report = json.loads((tmp_path / "compare.json").read_text())
    assert [finding["claim"] for finding in report["findings"]] == ["ODE rollouts beat SDE rollouts"]
    assert len(report["final"]["dgpo"]) == 3 and report["plan"]["final_s"] == 100.0
    document, other = tmp_path / "docs" / "comparison.md", "<!-- compare: paper table -->\nkept\n<!-- end -->\n"
    document.parent.mkdir()
    parts = ("table", "figures")
    document.write_text(
        f"before\n{other}"
        + "".join(f"<!-- compare: {tmp_path.name} {name} -->\nold\n<!-- end -->\n" for name in parts)
        + "after"
    )
    assert update_document(document, tmp_path)
    once = document.read_text()
    assert "old" not in once and table in once and once.startswith(f"before\n{other}") and once.endswith("\nafter")
    assert "](../ode_sde.png)" in once and update_document(document, tmp_path) and document.read_text() == once
    assert not update_document(tmp_path / "none.md", tmp_path)


@pytest.fixture(scope="module")
def bank() -> PatchBank:
    return PatchBank()


def test_patch_distance_sees_damage_and_not_content(bank: PatchBank) -> None:
    """Held-out pictures are near, whatever they show; blur, noise and a change of hue take them away."""
    rng = np.random.default_rng(5)
    pictures = rendered(data.shape_prompts("heldout"), 120, rng)
    near = bank.distance(pictures)
    assert near < 1.0
    by_tag = [
        bank.distance(rendered([p for p in data.shape_prompts("heldout") if p[1]["tag"] == tag], 60, rng))
        for tag in data.TAGS
    ]
    assert max(by_tag) < 1.6
    noisy = np.clip(pictures + rng.normal(0, 4, pictures.shape), 0, 255).astype(np.uint8)
    blurred = ndimage.gaussian_filter(pictures, (0, 0.6, 0.6, 0))
    for damaged in (noisy, blurred, pictures[..., [1, 2, 0]]):
        assert bank.distance(damaged) > 2.5 * near


def test_sharpness_by_hand() -> None:
    """A black and a white half: of the 40 differences of 5 × 5 pixels, 5 are 255, and the steepest tenth is 4 of them.
    Blur lowers it, and it is a mean over pictures."""
    picture = np.zeros((2, 5, 5, 3), np.uint8)
    picture[0, :, 2:] = 255
    assert sharpness(picture[:1]) == 255 and sharpness(picture) == 127.5
    pictures = rendered(data.shape_prompts("heldout"), 20, np.random.default_rng(5))
    assert sharpness(ndimage.gaussian_filter(pictures, (0, 0.6, 0.6, 0))) < 0.8 * sharpness(pictures)


def test_diversity_by_hand() -> None:
    """Two pictures of a prompt 10 levels apart: 10. Equal ones: 0. Groups are averaged in the square."""
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    pictures[1] = 10
    assert diversity(pictures[:2], 2) == pytest.approx(10)
    assert diversity(pictures[2:], 2) == 0
    assert diversity(pictures, 2) == pytest.approx(np.sqrt(50))


def test_a_run_goes_on_from_its_last_evaluation(tmp_path: Path) -> None:
    """Stopped between two evaluations, and done again: the first evaluation stays, training time goes on from there."""
    run = Run("final", "dgpo-sde", 0, 1e-4, 2, seconds=1e-3, marks=(0.5, 1.0))
    calls = []

    def after_one_step() -> bool:
        calls.append(1)
        return len(calls) > 1

    folder = tmp_path / run.name
    long = Run("final", "dgpo-sde", 0, 1e-4, 2, seconds=1e3, marks=(1e-6, 1.0))
    assert perform(long, tmp_path, QUICK, "cpu", lambda share: None, after_one_step) == {}
    assert finished_result(long, tmp_path) is None
    before = json.loads((folder / "points.json").read_text())["points"]
    assert [point["iteration"] for point in before] == [1]
    shares: list[float] = []
    done = perform(long, tmp_path, QUICK, "cpu", shares.append, lambda: len(shares) >= 2)
    assert done == {} and json.loads((folder / "points.json").read_text())["points"] == before
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3], "the second step was repeated"
    done = perform(run, tmp_path, QUICK, "cpu", shares.append, lambda: False)
    assert done["points"][0]["iteration"] == 1, "a run with other settings starts anew"
    assert done["points"][0]["training_s"] < before[0]["training_s"] * 100
    assert finished_result(run, tmp_path) == done
    # 8 pictures of 4 steps; 3 levels, of which the first, at σ = 1, has one row for each of the 2 groups.
    rows = 2 + 8 + 8
    backward = (done["points"][0]["training_forwards"] - 32 - 2 * rows) / rows
    assert backward == pytest.approx(2, rel=0.02)
    assert done["points"][0]["distance"] > 0 and done["points"][0]["sharpness"] > 0
    assert {"diversity", "signs"} == done["out_of_task"].keys() and not (folder / "checkpoints").exists()


def test_the_command_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL to it and its workers after the first run; the same command repeats nothing and ends with the figures.
    With more seeds it does what is new, with fewer or other settings nothing."""
    monkeypatch.chdir(tmp_path)
    command = ["--quick", "--runs-dir", "runs", "--systems", "dgpo", "flow-grpo"]
    started = PythonProcess(["-m", "benchmarks.compare", *command, "--seeds", "1"])
    wait_for(
        lambda: list(Path("runs/rivals/search").glob("*/result.json")) or started.returncode is not None, seconds=300
    )
    assert started.returncode is None
    kill_all(started)
    before = results()
    assert len(before) < 5
    killed_s = json.loads(Path("runs/rivals/spent.json").read_text())["wall_s"]
    # From here on, workers are forked from a server that has imported everything.
    monkeypatch.setattr(workers, "multiprocessing", Mock(get_context=lambda _: CONTEXT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the comparison sets
    assert compare([*command, "--seeds", "1"]) == 0
    assert before.items() <= results().items()
    made = {path.name for path in Path("runs/rivals/results").iterdir()}
    assert {"compare.json", "equal.md", "table.md", "rivals.png"} <= made
    report = json.loads(Path("runs/rivals/results/compare.json").read_text())
    assert {system: len(runs) for system, runs in report["final"].items()} == {"dgpo": 1, "flow-grpo": 1}
    assert report["base"]["points"][0]["distance"] == 0
    assert "DGPO against Flow-GRPO: " in capsys.readouterr().out
    before = results()
    assert compare([*command, "--seeds", "2"]) == 0
    assert before.items() < results().items()
    again = json.loads(Path("runs/rivals/results/compare.json").read_text())
    assert {system: len(runs) for system, runs in again["final"].items()} == {"dgpo": 2, "flow-grpo": 2}
    assert again["machine"]["wall_s"] > report["machine"]["wall_s"] > killed_s > 0, "all starts count"
    for changed, name in ((["--processes", "1", "--seeds", "2"], "processes"), (["--seeds", "1"], "seeds")):
        with pytest.raises(UserError) as caught:
            compare([*command, *changed])
        assert str(caught.value) == (
            f"runs/rivals: a comparison with another {name} was begun there; remove it, or choose another --runs-dir"
        )


def results() -> dict[Path, int]:
    """When each result was written."""
    return {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/*/*/result.json")}


def kill_all(process: PythonProcess) -> None:
    """SIGKILL to it and to all that it started."""
    for child in psutil.Process(process.process.pid).children(recursive=True):
        child.kill()
    process.kill()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--systems", "ppo"], "--systems ppo: name some of dgpo, nft, "),
        (["--study", "ppo"], "--study ppo: name one of rivals, paper, "),
        (["--study", "four-steps", "--systems", "nft"], "--systems nft: name some of dgpo, dgpo-sde"),
        (["--quick", "--long"], "command line: --quick and --long exclude one another"),
        (["--minuts", "3"], "command line: unknown setting 'minuts': did you mean 'minutes'?"),
        (["--trials", "9"], "command line: trials: input should be less than or equal to 7, not '9'"),
        (["--device", "gpu"], "--device gpu: no such device"),
    ],
)
def test_mistakes_are_one_line(args: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        compare(args)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
