"""What a comparison says: curves and findings by hand, and the report."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare.curves import curve, mean_interval
from benchmarks.compare.findings import Findings
from benchmarks.compare.report import update_document, write_report
from benchmarks.compare.rivals import Rivals
from benchmarks.compare.run import Run
from tests.compare_runs import carry_out, make_plan, result


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
