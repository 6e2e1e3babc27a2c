"""The comparison: fair plans, runs that go on, and the command."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compare import settings as settings_of_compare
from benchmarks.compare import workers
from benchmarks.compare.__main__ import compare
from benchmarks.compare.plan import (
    LR_STEP,
    OWN_STEP,
    choose,
    draw_run,
    finished_seeds,
    fitted,
    from_json,
    next_run,
    to_json,
)
from benchmarks.compare.run import Run, finished_result, perform
from benchmarks.compare.studies import STUDIES
from benchmarks.compare.systems import NORMAL, QUICK, SYSTEMS, configuration
from dgpo_fast.config.reading import flat
from dgpo_fast.errors import UserError
from tests.compare_runs import ALL, carry_out, make_plan
from tests.processes import CONTEXT, PythonProcess
from tests.servers import wait_for


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
