"""What the comparison leaves: compare.json, tables, findings, figures, and the marked parts of a document."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.curves import mean_interval
from benchmarks.compare.figures import FIGURES, draw_figures
from benchmarks.compare.findings import Finding, Findings
from benchmarks.compare.plan import SEARCH_SHARE, Plan, choose, final_reward, to_json, trials
from benchmarks.compare.rivals import Rivals, interval
from benchmarks.compare.studies import STUDIES
from benchmarks.compare.systems import SYSTEMS, with_factor
from dgpo_fast.run.metrics import write_json


def write_report(
    plan: Plan, results: Mapping[str, dict[str, Any]], base: Mapping[str, Any], machine: Mapping[str, Any], folder: Path
) -> list[Finding]:
    """Writes everything into `folder` and returns the findings."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = {system: _final_runs(plan, system, results) for system in plan.systems}
    scores = base["points"][0]
    rivals = Rivals(runs, scores)
    findings = Findings(runs, scores).all() if STUDIES[plan.study].claims else rivals.findings()
    parts = {
        "equal": rivals.table(),
        "table": table(runs, base),
        "search": search_table(plan, results),
        "findings": findings_text(findings),
        "about": about(plan, [*results.values()], machine),
    }
    for name, text in parts.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    seconds = "s" if machine["kind"] != "cpu" else "s of the run's thread at work"
    figures = draw_figures(plan.study, runs, scores, folder, seconds)
    search = {name: result for name, result in results.items() if result["run"]["kind"] == "search"}
    write_json(
        folder / "compare.json",
        {
            "machine": dict(machine),
            "plan": to_json(plan),
            "base": dict(base),
            "findings": [asdict(finding) for finding in findings],
            "figures": figures,
            "final": runs,
            "search": search,
        },
    )
    return findings


def _final_runs(plan: Plan, system: str, results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = choose(plan, system, results)
    assert chosen is not None
    return [results[plan.final(system, seed, chosen).name] for seed in range(plan.seeds)]


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any]) -> str:
    """Every system at the end of its time, as Markdown."""
    rows = [
        "| system | time | forwards | reward | distance from the base | patch distance | sharpness | diversity | "
        "signs read | iterations | images drawn | lr, groups, own setting |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    point, extra, real = base["points"][0], base["out_of_task"], base["rendered_pictures"]
    came = (point["reward_mean"], point["patch_distance"], point["sharpness"], extra["diversity"], extra["signs"])
    rows.append("| the model as it came | | | {:.3f} | 0 | {:.2f} | {:.1f} | {:.1f} | {:.3f} | | | |".format(*came))
    for system, seeds in runs.items():
        last = [run["points"][-1] for run in seeds]
        cells = [
            SYSTEMS[system].label,
            f"{seeds[0]['run']['seconds']:.0f} s",
            f"{mean_interval([end['training_forwards'] for end in last])[0] / 1000:,.0f} thousand",
            interval([end["reward_mean"] for end in last], 3),
            interval([end["distance"] for end in last], 4),
            interval([end["patch_distance"] for end in last], 2),
            interval([end["sharpness"] for end in last], 1),
            interval([run["out_of_task"]["diversity"] for run in seeds], 1),
            interval([run["out_of_task"]["signs"] for run in seeds], 3),
            f"{mean_interval([end['iteration'] for end in last])[0]:.0f}",
            f"{mean_interval([drawn_images(run) for run in seeds])[0]:,.0f}",
            setting(seeds[0]["run"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    sharp = f"{real['patch_distance']:.2f} | {real['sharpness']:.1f}"
    rows.append(f"| rendered pictures | | | | | {sharp} | | | | | |")
    return "\n".join(rows)


def setting(run: Mapping[str, Any]) -> str:
    """What was searched, as a run has it: learning rate, groups and the system's own setting."""
    system = SYSTEMS[run["system"]]
    group, name = system.own.split(".")
    own = getattr(getattr(with_factor(system.recipe(), system.own, run["factor"]), group), name)
    return f"{run['lr']:g}, {run['groups']}, {name} {own:g}"


def drawn_images(run: Mapping[str, Any]) -> int:
    """Images that a run drew and scored to train on."""
    return run["source"].get("drawn_images", run["points"][-1]["trained_images"])


def search_table(plan: Plan, results: Mapping[str, dict[str, Any]]) -> str:
    """Every setting that was tried, as Markdown."""
    rows = ["| system | lr, groups, own setting | iterations | reward | |", "|---|---|---|---|---|"]
    for system in plan.systems:
        chosen = choose(plan, system, results)
        for run in trials(plan, system, results):
            result = results[run.name]
            failed = result.get("failure")
            reward = "failed" if failed else f"{final_reward(result):.3f}"
            done = result["points"][-1]["iteration"] if result["points"] else 0
            note = "chosen" if run == chosen else failed or ""
            rows.append(f"| {SYSTEMS[system].label} | {setting(run.as_json())} | {done} | {reward} | {note} |")
    return "\n".join(rows)


def findings_text(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown list."""
    return "\n".join(
        f"- **{finding.claim[0].upper()}{finding.claim[1:]}: {finding.verdict}.** {finding.sentence}"
        for finding in findings
    )


def about(plan: Plan, results: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """How it was measured, as Markdown."""
    trained = [result["points"][-1] for result in results if result.get("points")]
    wall_s, cpu_s = (sum(point[name] for point in trained) for name in ("training_wall_s", "training_s"))
    text = (
        f"{machine['device']}, {machine['cpu_count']} CPU cores, {machine['processes']} runs at a time, torch "
        f"{machine['torch']}, commit {machine['commit']}, {machine['date']}. {plan.trials} settings of each system "
        f"were tried for {SEARCH_SHARE * plan.final_s:.0f} s of training; the best one trained for {plan.final_s:.0f} "
        f"s, with {plan.seeds} seeds."
    )
    patient = {SYSTEMS[name].label: plan.patience(name) for name in plan.systems if plan.patience(name) != 1}
    text += "".join(f" {label} had {times:g} times as long, in both." for label, times in patient.items())
    if machine["wall_s"] is not None:
        text += f" All of it took {machine['wall_s'] / 60:.0f} minutes on the wall, over all starts of the command."
    if machine["kind"] != "cpu":
        return text
    return text + (
        " Seconds are those of a run's one thread at work; on the wall, beside whatever else the machine did, the "
        f"runs took {wall_s / cpu_s:.2f} times as long. The same work took up to {unevenness(results):.2f} times as "
        "many of these seconds in one run as in another of its system and groups."
    )


def unevenness(results: Sequence[Mapping[str, Any]]) -> float:
    """The largest ratio of seconds a forward between two runs of one system with as many groups."""
    rates: dict[tuple[str, int], list[float]] = {}
    for result in results:
        last, run = (result.get("points") or [{}])[-1], result["run"]
        if last.get("training_forwards"):
            rate = last["training_s"] / last["training_forwards"]
            rates.setdefault((run["system"], run["groups"]), []).append(rate)
    return max(max(of) / min(of) for of in rates.values())


def update_document(document: Path, folder: Path) -> bool:
    """Replaces the parts of a Markdown file between `<!-- compare: STUDY NAME -->` and `<!-- end -->` by `NAME.md`, and
    `figures` by the figures, for the study whose results are in `folder`. False if there is no such file."""
    if not document.is_file():
        return False
    document.write_text(with_parts(document, folder), encoding="utf-8")
    return True


def with_parts(document: Path, folder: Path) -> str:
    """The text of `document` with its marked parts as the files in `folder` have them."""

    def part(match: re.Match) -> str:
        file = folder / f"{match[1]}.md"
        content = file.read_text(encoding="utf-8") if file.exists() else _figures(document, folder)
        return f"<!-- compare: {folder.name} {match[1]} -->\n\n{content}\n<!-- end -->"

    text = document.read_text(encoding="utf-8")
    return re.sub(rf"<!-- compare: {re.escape(folder.name)} (\w+) -->.*?<!-- end -->", part, text, flags=re.S)


def _figures(document: Path, folder: Path) -> str:
    names = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["figures"]
    where = Path(os.path.relpath(folder, document.parent)).as_posix()
    return "\n".join(f"![{FIGURES[Path(name).stem][0]}]({where}/{name})\n" for name in names)
