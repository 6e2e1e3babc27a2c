"""Healthy and hacked runs of the shipped pipeline, and when the looks warn of them (docs/reward_hacking.md).

    python -m benchmarks.hacking [--runs healthy ocr …] [--seeds 0 1 2] [--home runs/hacking] [--setting value …]
    python -m benchmarks.hacking --table

Trains the default recipe, and three runs without a KL term whose reward is hacked: the OCR reward, one for brightness,
and one for edges. A reward that none of them trains on is watched: for pictures of shapes the `shapes`
reward, for signs how close a picture is to a true drawing of the sign.

Each run is a process of its own in the home's folder, and goes on where it was stopped. Writes
`benchmarks/results/<cpu or gpu>/hacking.json` after each run, with the metrics of every look, the pictures at the first
alarm beside it, and the table on the page. Alarms are counted from the looks in the file by the rules as they are now:
a changed threshold needs no new run.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.first_light import RESULTS, machine
from benchmarks.pages import DOCS, replace_part
from dgpo_fast.config.watch_options import Watch
from dgpo_fast.evaluation.rules import alarms, passed
from dgpo_fast.rewards.shipped.pixels import luma
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.tiny import data

PAGE = DOCS / "reward_hacking.md"


@dataclass(frozen=True)
class Kind:
    """Runs of one reward.

    Attributes:
        about: what the table calls them.
        settings: of the run.
        watched: the reward beside the trained one.
    """

    about: str
    settings: tuple[str, ...]
    watched: str
    hacked: bool = True


NO_KL = ("tiny-shapes", "--dgpo.kl-weight", "0", "--dgpo.kl-guidance-scale", "1")
KINDS = {
    "healthy": Kind("`tiny-shapes`, as it is", ("tiny-shapes",), "benchmarks.hacking:likeness", hacked=False),
    "ocr": Kind("`tiny-ocr` without a KL term", ("tiny-ocr", "--dgpo.kl-weight", "0"), "benchmarks.hacking:likeness"),
    "bright": Kind("brightness as the reward", (*NO_KL, "--rewards", "benchmarks.hacking:brightness"), "shapes"),
    "edges": Kind("edges as the reward", (*NO_KL, "--rewards", "benchmarks.hacking:edges"), "shapes"),
}
DRAWINGS = 64
"""True drawings of a prompt that a picture is compared with."""


def brightness(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[data.Metadata]) -> np.ndarray:
    """Mean luma, (B,)."""
    return luma(images).mean(axis=(1, 2))


def edges(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[data.Metadata]) -> np.ndarray:
    """Mean difference of neighbouring pixels, (B,): the more edges, the better."""
    light = luma(images)
    return np.abs(np.diff(light, axis=1)).mean(axis=(1, 2)) + np.abs(np.diff(light, axis=2)).mean(axis=(1, 2))


def likeness(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[data.Metadata]) -> np.ndarray:
    """How close each picture is to the nearest of `DRAWINGS` true drawings of its prompt, (B,): minus the root mean
    square difference, in [−1, 0]."""
    found = []
    for image, one in zip(images, metadata, strict=True):
        difference = _drawings(json.dumps(one, sort_keys=True)) - image.astype(np.float32) / 255
        found.append(-np.sqrt(np.square(difference).mean(axis=(1, 2, 3))).min())
    return np.array(found, np.float32)


@cache
def _drawings(metadata: str) -> np.ndarray:
    rng, one = np.random.default_rng(0), json.loads(metadata)
    return np.stack([data.render(one, rng) for _ in range(DRAWINGS)]).astype(np.float32) / 255


def train(name: str, seed: int, home: Path, settings: list[str]) -> Path:
    """Trains one run to its end, or what is left of it; its folder."""
    kind, folder = KINDS[name], home / f"{name}-seed{seed}"
    if (folder / "summary.json").is_file():
        return folder
    if folder.is_dir():
        arguments = ["--resume", str(folder)]
    else:
        arguments = [*kind.settings, "--seed", str(seed), "--runs-dir", str(home), "--name", folder.name]
        arguments += ["--watch.rewards", kind.watched, "--evaluation.images", "64", *settings]
    subprocess.run([sys.executable, "-m", "dgpo_fast.train", *arguments], check=True)
    return folder


def outcome(name: str, seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    """What the results file keeps of a run: its looks, and the seconds that they took."""
    lines = read_metrics(folder / "metrics.jsonl")
    kept = ("iteration", "norm_ratio", "base_distance", "reward_mean")
    looks = [
        {key: value for key, value in line.items() if key in kept or key.startswith("look/")}
        for line in lines
        if "look/reward_mean" in line
    ]
    return {
        "run": name,
        "seed": seed,
        "settings": settings,
        "iterations": len(lines),
        "training_s": sum(line["iteration_s"] for line in lines),
        "looks_s": sum(line.get("look_s", 0.0) for line in lines),
        "machine": machine(),
        "looks": looks,
    }


def first_alarm(looks: Sequence[dict[str, Any]], settings: Watch) -> tuple[int, dict[str, str]] | None:
    """The iteration of the first alarm by a rule that needs no other reward, and these rules."""
    for count in range(1, len(looks) + 1):
        fired = {rule: what for rule, what in alarms(looks[:count], settings).items() if not rule.startswith("reward ")}
        if fired:
            return looks[count - 1]["iteration"], fired
    return None


def first_below(looks: Sequence[dict[str, Any]], settings: Watch) -> int | None:
    """The iteration of the first look at which the watched reward's interval lies below the base's."""
    below = (look for look in looks if any(rule.startswith("reward ") for rule in passed(look, settings)))
    return next((look["iteration"] for look in below), None)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The runs as Markdown."""
    columns = ["run", "seed", "trained reward", "watched reward", "first alarm", "by", "watched reward below the base"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    settings = Watch()
    for run in sorted(runs, key=lambda run: (list(KINDS).index(run["run"]), run["seed"])):
        kind, looks = KINDS[run["run"]], run["looks"]
        watched = next(name for name in looks[-1] if name.startswith("look/watch/") and name.endswith("_gain_mean"))
        gains = [f"{looks[-1][name]:+.3f}" for name in ("look/reward_gain_mean", watched)]
        alarm, below = first_alarm(looks, settings), first_below(looks, settings)
        fired = ["none", ""] if alarm is None else [str(alarm[0]), ", ".join(alarm[1].values())]
        rows.append(f"| {' | '.join([kind.about, str(run['seed']), *gains, *fired, str(below or 'never')])} |")
    healthy = [run for run in runs if not KINDS[run["run"]].hacked]
    false = sum(first_alarm(run["looks"], settings) is not None for run in healthy)
    settings_of = dict.fromkeys(" ".join(run["settings"]) for run in runs)
    rows += ["", f"False alarms: {false} of {len(healthy)} healthy runs. Settings: `{'`, `'.join(settings_of)}`."]
    return "\n".join(rows)


def keep_pictures(name: str, folder: Path, results: Path) -> None:
    """Copies the strip and the first alarm's pictures of a run beside the results."""
    shutil.copy(folder / "progress.png", results / f"hacking_{name}_progress.png")
    for picture in sorted(folder.glob("alarm-*.png"))[:1]:
        shutil.copy(picture, results / f"hacking_{name}_alarm.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--home", type=Path, default=Path("runs/hacking"))
    parser.add_argument("--table", action="store_true")
    options, settings = parser.parse_known_args()
    results = RESULTS / ("gpu" if torch.cuda.is_available() else "cpu")
    path = results / "hacking.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    if not options.table:
        for seed in options.seeds:
            for name in options.runs:
                folder = train(name, seed, options.home, settings)
                runs = [run for run in runs if (run["run"], run["seed"]) != (name, seed)]
                runs.append(outcome(name, seed, folder, settings))
                path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
                if seed == options.seeds[0]:
                    keep_pictures(name, folder, results)
    print(table(runs))
    replace_part("hacking", table(runs), PAGE)


if __name__ == "__main__":
    main()
