"""The results of an evaluation: `results.json`, the table on the console and the contact sheet."""

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from dgpo_fast import __version__
from dgpo_fast.evaluation.captions import missing_note
from dgpo_fast.evaluation.figures import contact_sheet
from dgpo_fast.evaluation.folder import CONTACT_SHEET, RESULTS, EvaluationFolder, Row
from dgpo_fast.evaluation.statistics import Mean, geneval_scores
from dgpo_fast.prompts import in_turn
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards.registry import parse_spec
from dgpo_fast.run.console import Console
from dgpo_fast.run.metrics import write_json
from dgpo_fast.wording import FEWEST_PROMPTS, number

SUM = "reward"
"""Name of the weighted sum."""
SHEET_IMAGES = 48
COLUMNS = 4


def summarise(rows: Sequence[Row], rewards: Sequence[str]) -> JsonObject:
    """Means and 95 % intervals of every score, in all and per tag, and GenEval's figures if prompts are GenEval's.

    Args:
        rows: the scored pictures.
        rewards: the rewards as they were named, with their weights.
    """
    names = score_names(rows, rewards)
    by_tag: dict[str, list[Row]] = {}
    for row in rows:
        by_tag.setdefault(row.prompt.tag, []).append(row)
    prompts = [row.prompt for row in rows]
    is_geneval = all("include" in prompt.metadata and "tag" in prompt.metadata for prompt in prompts)
    judged = [name for name in names if name.endswith("/correct")] if is_geneval else []
    return {
        "images_count": len(rows),
        "images_failed_count": sum(row.failed for row in rows),
        "images_not_finite_count": sum(bool(row.fault) for row in rows),
        "prompts_count": len({prompt.text for prompt in prompts}),
        "scores": {name: _summary(rows, name) for name in names},
        "tags": {tag: {name: _summary(members, name) for name in names} for tag, members in sorted(by_tag.items())},
        "geneval": {name.removesuffix("/correct"): geneval_scores(column(rows, name), prompts) for name in judged},
    }


def score_names(rows: Sequence[Row], rewards: Sequence[str]) -> list[str]:
    """The scores that rows have: the weighted sum if it is a score of its own, then rewards and their parts."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    weights = [parse_spec(reward).weight for reward in rewards]
    return names if weights == [1.0] else [SUM, *names]


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """One score of all rows, float64 (N,), NaN if there is none."""
    return np.array([row.reward if name == SUM else row.scores.get(name, math.nan) for row in rows])


def _summary(rows: Sequence[Row], name: str) -> JsonObject:
    found = Mean.of(column(rows, name), [row.prompt for row in rows])
    return {
        "score_mean": found.mean,
        "score_ci95": found.ci95,
        "prompts_count": found.prompts,
        "images_count": found.images,
    }


def write_report(folder: EvaluationFolder, rows: Sequence[Row], console: Console, facts: JsonObject) -> None:
    """Writes `results.json` and the contact sheet, and prints the table.

    Args:
        folder: the evaluation's, complete.
        rows: its pictures.
        facts: additional values for `results.json`, by name.
    """
    made_with = folder.made_with()
    results = summarise(rows, made_with["rewards"])
    size = folder.read_image(rows[0]).shape
    more = {
        "made_with": made_with,
        "image_height_px": size[0],
        "image_width_px": size[1],
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    write_json(folder.path / RESULTS, {**results, **more, **facts})
    shown = sorted(in_turn(rows, lambda row: row.prompt.tag, min(SHEET_IMAGES, len(rows))), key=lambda r: r.prompt.tag)
    captions = [f"{row.prompt.text}\n{_score(row)}" for row in shown]
    contact_sheet([folder.read_image(row) for row in shown], captions, folder.path / CONTACT_SHEET)
    if note := missing_note(captions):
        console.note(note)
    print_results(results, made_with["rewards"], console)
    console.note(f"pictures, index, results and contact sheet are in {folder.path}")


def _score(row: Row) -> str:
    """What the contact sheet says of a picture."""
    return row.fault or ("not scored" if row.failed else f"{row.reward:.2f}")


def print_results(results: JsonObject, rewards: Sequence[str], console: Console) -> None:
    """The table, with tags in rows and rewards in columns; below it their parts, and GenEval's figures."""
    named = {SUM, *(parse_spec(reward).name for reward in rewards)}
    columns = [name for name in results["scores"] if name in named]
    for start in range(0, len(columns), COLUMNS):
        console.rich.print(_table(results, columns[start : start + COLUMNS]))
    for name in results["scores"]:
        if name not in named:
            console.note(f"{name}: {with_interval(results['scores'][name])}")
    for name, geneval in results["geneval"].items():
        low, high = geneval["overall_score_ci95"]
        fewest = min(scores[f"{name}/correct"]["prompts_count"] for scores in results["tags"].values())
        interval = f" ± {(high - low) / 2:.4f}" if fewest >= FEWEST_PROMPTS else ""
        console.note(
            f"GenEval's overall score by {name}: {geneval['overall_score']:.4f}{interval} (mean over "
            f"{len(geneval['tags'])} tags of the share of correct images); {geneval['correct_images_share']:.2%} of "
            f"images and {geneval['correct_prompts_share']:.2%} of prompts are correct"
        )


def _table(results: JsonObject, names: Sequence[str]) -> Table:
    table = Table("tag", title="mean score, 95 % interval", title_justify="left")
    for name in names:
        table.add_column("weighted sum" if name == SUM else escape(name), justify="right", overflow="fold")
    for what in ("prompts", "images"):
        table.add_column(what, justify="right")
    if len(results["tags"]) > 1:
        for tag, scores in results["tags"].items():
            table.add_row(escape(tag), *_cells(scores, names))
        table.add_section()
    table.add_row("all", *_cells(results["scores"], names), style="bold")
    return table


def _cells(scores: JsonObject, names: Sequence[str]) -> list[str]:
    counts = [max(one[f"{what}_count"] for one in scores.values()) for what in ("prompts", "images")]
    return [*(with_interval(scores[name]) for name in names), *map(str, counts)]


def with_interval(scores: JsonObject, sign: str = "") -> str:
    """`0.564 ± 0.053`, to two digits of the interval; with the sign "+", `+0.564 ± 0.053`.

    Of fewer than five prompts, `0.564` alone.
    """
    mean, (low, high) = scores["score_mean"], scores["score_ci95"]
    half = (high - low) / 2
    if not math.isfinite(mean):
        return "–"
    if scores["prompts_count"] < FEWEST_PROMPTS:
        return number(mean, sign=sign)
    places = decimals(half)
    return f"{number(mean, places, sign)} ± {number(half, places)}"


def decimals(half: float) -> int:
    """Places after the point that show two digits of an interval's half."""
    return min(max(1 - math.floor(math.log10(half)), 2), 6) if math.isfinite(half) and half > 0 else 3


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "peft", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"dgpo_fast": __version__, "python": platform.python_version(), **versions, **gpu}
