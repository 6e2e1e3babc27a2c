"""Healthy and hacked runs of the shipped pipeline: when the looks warn, and what prevents it (docs/reward_hacking.md).

    python -m benchmarks.hacking [--runs healthy bright bright+growth …] [--seeds 0 1 2] [--home runs/hacking]
    python -m benchmarks.hacking --table

Trains the default recipe, and three runs whose reward is hacked: the OCR reward, one for brightness, and one for edges.
`REWARD+DEFENCE` is a hacked run with one of the defences. Every run watches the reward that it is trained on by itself,
and others: how close a picture is to a true drawing of its prompt, and for pictures of shapes the `shapes` reward.

Each run is a process of its own in the home's folder, and goes on where it was stopped; one that the results have is
not trained again. Writes `benchmarks/results/<cpu or gpu>/hacking.json` after each run, with the metrics of every look,
the pictures at the first alarm beside it, and the tables on the page. Alarms are counted from the looks in the file by
the rules as they are now: a changed threshold needs no new run.
"""

import argparse
import itertools
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
from PIL import Image

from benchmarks.first_light import RESULTS, machine
from benchmarks.pages import DOCS, replace_part
from dgpo_fast.config.watch_options import Watch
from dgpo_fast.evaluation.figures import progress_strip
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.evaluation.rules import alarms, signs, together
from dgpo_fast.evaluation.watch import SHOWN_PROMPTS
from dgpo_fast.rewards.shipped.pixels import luma
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.tiny import data
from dgpo_fast.wording import number

PAGE = DOCS / "reward_hacking.md"
SHORT = ("--rollout.groups", "2", "--iterations", "15", "--evaluation.images", "16")
LONG = ("--rollout.groups", "2", "--iterations", "60", "--evaluation.images", "16")
"""So that a run takes a minute or two, or some minutes."""
EVERY = (1, 3, 5)
"""Iterations between looks, for which alarms are counted."""


@dataclass(frozen=True)
class Kind:
    """Runs of one reward.

    Attributes:
        about: what the tables call them.
        settings: of the run.
        reward: what a hacked run is trained on; a healthy run has its recipe's.
        watched: by name, what is not trained on. `drawn` or else `likeness` says whether images have become worse;
            `trained` is the reward that is trained on, by itself.
        beside: a second reward, which defences may use.
    """

    about: str
    settings: tuple[str, ...]
    watched: dict[str, str]
    reward: str = ""
    beside: str = ""


@dataclass(frozen=True)
class Defence:
    """What a hacked run is given against it.

    Attributes:
        about: what the tables call it.
        settings: of the run; BESIDE stands for the second reward.
        kl_weight: of DGPO's KL term.
        beside: the weight of the second reward; None: there is none.
    """

    about: str
    settings: tuple[str, ...] = ()
    kl_weight: float = 0.0
    beside: float | None = None


HERE = "benchmarks.hacking:"
LIKENESS = {"likeness": f"{HERE}likeness"}
DRAWN = {"drawn": "dgpo_fast.tiny.shapes:ShapesReward", **LIKENESS}
READ = {"trained": "dgpo_fast.rewards.shipped.ocr:OcrReward", **LIKENESS}
SHAPES = ("tiny-shapes", "--dgpo.kl-guidance-scale", "1")
KINDS = {
    "healthy": Kind("`tiny-shapes`, as it is", ("tiny-shapes",), LIKENESS),
    "long": Kind("`tiny-shapes`, 60 iterations", ("tiny-shapes",), LIKENESS),
    "ocr": Kind("`tiny-ocr` without a KL term", ("tiny-ocr",), READ, "ocr", f"{HERE}likeness"),
    "bright": Kind(
        "brightness as the reward", SHAPES, {"trained": f"{HERE}brightness", **DRAWN}, f"{HERE}brightness", "shapes"
    ),
    "edges": Kind("edges as the reward", SHAPES, {"trained": f"{HERE}edges", **DRAWN}, f"{HERE}edges", "shapes"),
}
DEFENCES = {
    "": Defence("nothing"),
    "hinge": Defence("norm hinge", ("--regulariser.norm-hinge", "1")),
    "kl": Defence("plain KL", kl_weight=0.3),
    "growth": Defence("growing KL", ("--regulariser.kl-growth", "100"), kl_weight=0.1),
    "gate": Defence("gated KL", ("--regulariser.kl-gate", "BESIDE"), kl_weight=1.0, beside=0.0),
    "each": Defence("two rewards, each on its own scale", ("--advantage.of", "each"), beside=1.0),
}
RUNS = [name + (f"+{defence}" if defence else "") for name in KINDS for defence in DEFENCES]
RUNS = [name for name in RUNS if "+" not in name or KINDS[name.partition("+")[0]].reward]
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


def parts_of(run: str) -> tuple[Kind, Defence]:
    """The reward and the defence of the run `KIND` or `KIND+DEFENCE`."""
    kind, _, defence = run.partition("+")
    return KINDS[kind], DEFENCES[defence]


def settings_of(run: str, seed: int) -> list[str]:
    """The settings of a run, as the command line takes them."""
    kind, defence = parts_of(run)
    length, looks = (LONG, 5) if run == "long" else (SHORT, 3 if "+" in run else 1)
    settings = [*kind.settings, *length, "--seed", str(seed), "--watch.every", str(looks)]
    settings += ["--watch.rewards", *(f"{name}={source}" for name, source in kind.watched.items())]
    if kind.reward:
        beside = [] if defence.beside is None else [f"{kind.beside}={defence.beside:g}"]
        settings += ["--dgpo.kl-weight", f"{defence.kl_weight:g}", "--rewards", kind.reward, *beside]
    return settings + [kind.beside if text == "BESIDE" else text for text in defence.settings]


def current(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the settings that runs have now."""
    return [run for run in runs if run["settings"] == settings_of(run["run"], run["seed"])]


def train(run: str, seed: int, home: Path, settings: list[str]) -> Path:
    """Trains one run, or what is left of it, and returns its folder."""
    folder = home / f"{run}-{seed}"
    started = folder.is_dir()
    arguments = ["--resume", str(folder)] if started else [*settings, "--runs-dir", str(home), "--name", folder.name]
    subprocess.run([sys.executable, "-m", "dgpo_fast.train", *arguments], check=True)
    return folder


def outcome(run: str, seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    """What the results file keeps of a run: its looks, what every iteration says for free, and the seconds."""
    lines = read_metrics(folder / "metrics.jsonl")
    free = ("iteration", "norm_ratio", "base_distance", "reward_mean", "reward_group_std", "kl_gate_mean")
    return {
        "run": run,
        "seed": seed,
        "settings": settings,
        "training_s": sum(line["iteration_s"] for line in lines),
        "looks_s": sum(line.get("look_s", 0.0) for line in lines),
        "machine": machine(),
        "iterations": [{key: line[key] for key in free if key in line} for line in lines],
        "looks": [
            {key: line[key] for key in line if key in free or key.startswith("look/")}
            for line in lines
            if "look/reward_mean" in line
        ],
    }


def first_alarm(looks: Sequence[dict[str, Any]]) -> tuple[int, dict[str, str]] | None:
    """The iteration of the first alarm by the rules as they are by default, and these rules."""
    for count in range(1, len(looks) + 1):
        if fired := alarms(looks[:count], Watch()):
            return looks[count - 1]["iteration"], fired
    return None


def unaided(looks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The looks of a run that watches no other reward."""
    return [{key: value for key, value in look.items() if not key.startswith("look/watch/")} for look in looks]


def first_below(looks: Sequence[dict[str, Any]], watched: str) -> int | None:
    """The iteration of the first look at which the interval of what is watched lies below the base's, while the trained
    reward is above."""
    name = f"look/watch/{watched}_gain_ci95"
    return next((look["iteration"] for look in looks if look[name][1] < 0 < look["look/reward_gain_mean"]), None)


def watched_by(run: dict[str, Any]) -> str:
    """The reward that says whether images have become worse."""
    return "drawn" if "drawn" in parts_of(run["run"])[0].watched else "likeness"


def row(cells: Sequence[object]) -> str:
    """Of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def alarm_table(runs: Sequence[dict[str, Any]]) -> str:
    """Of the runs without a defence: when the rules fire, and when what is watched is worse, for fewer and fewer looks;
    what is learned does not depend on them."""
    columns = ["run", "seed", "trained reward", "watched reward", *(f"a look every {n}" for n in EVERY)]
    rows = [row([*columns, "by", "alarm with the watched reward"]), "|---" * (len(columns) + 2) + "|"]
    false, healthy = dict.fromkeys(EVERY, 0), dict.fromkeys(EVERY, 0)
    for run in (run for run in runs if "+" not in run["run"]):
        kind, looks, watched, when, by = parts_of(run["run"])[0], run["looks"], watched_by(run), [], "none"
        for n in EVERY:
            some = [look for look in looks if look["iteration"] % n == 0]
            if n % looks[0]["iteration"]:
                when.append("")
                continue
            alarm = first_alarm(unaided(some))
            when.append(f"{alarm[0] if alarm else 'none'} / {first_below(some, watched) or 'never'}")
            by = ", ".join(alarm[1].values()) if alarm and by == "none" else by
            healthy[n], false[n] = healthy[n] + (not kind.reward), false[n] + (not kind.reward and alarm is not None)
        gains = [f"{looks[-1][f'look/{name}_gain_mean']:+.3f}" for name in ("reward", f"watch/{watched}")]
        aided = first_alarm(looks)
        rows.append(row([kind.about, run["seed"], *gains, *when, by, aided[0] if aided else "none"]))
    told = ", ".join(f"{false[n]} of {healthy[n]} with a look every {n}" for n in EVERY)
    looks = [look for run in runs if not parts_of(run["run"])[0].reward for look in run["looks"]]
    sums = [together(signs(look, Watch()))[0] for look in looks]
    told += f". Largest sum of signs in {len(sums)} looks of healthy runs: {max(sums, default=0):.2f}"
    return "\n".join([*rows, "", f"False alarms in healthy runs: {told}. Settings: `{' '.join(SHORT)}`."])


def defence_table(runs: Sequence[dict[str, Any]]) -> str:
    """Of hacked runs: what a defence keeps of the trained reward, and what it avoids of the loss."""
    columns = ["reward", "defence", "trained reward", "kept", "watched reward", "loss avoided", "likeness", "distance"]
    rows = [row(columns), "|---" * len(columns) + "|"]
    by_name = {(run["run"], run["seed"]): run for run in runs}
    for run in runs:
        kind, defence = parts_of(run["run"])
        plain = by_name.get((run["run"].partition("+")[0], run["seed"]))
        if not kind.reward or plain is None:
            continue
        names = [f"look/watch/{name}_gain_mean" for name in ("trained", watched_by(run), "likeness")]
        (gain, worse, likeness), (most, worst, _) = ([of["looks"][-1][name] for name in names] for of in (run, plain))
        kept, avoided = ("", "") if run is plain else (f"{gain / most:.0%}", f"{1 - worse / worst:.0%}")
        distance = [line["base_distance"] for line in run["iterations"] if "base_distance" in line][-1]
        cells = [kind.about, defence.about, f"{gain:+.3f}", kept, f"{worse:+.3f}", avoided if worst < 0 else ""]
        rows.append(row([*cells, f"{likeness:+.3f}", number(distance, 2)]))
    given = [f"{defence.about}: `{shown(name)}`" for name, defence in DEFENCES.items() if name]
    return "\n".join([*rows, "", f"Settings. {'; '.join(given)}."])


def shown(defence: str) -> str:
    """The settings that a defence adds to a run of the brightness reward."""
    plain, given = settings_of("bright", 0), settings_of(f"bright+{defence}", 0)
    return " ".join(given[plain.index("--dgpo.kl-weight") :]).replace(HERE, "")


def strip(looks: dict[str, Path], path: Path) -> None:
    """The same prompts in several looks, by their labels: the pictures in a run's folder `looks/`."""
    columns = [np.asarray(Image.open(look)) for look in looks.values()]
    base = Evaluation.load(next(iter(looks.values())).parent / "base.npz")
    captions = [prompt.text for prompt in base.prompts[:: len(base.prompts) // SHOWN_PROMPTS]]
    progress_strip(columns, list(looks), captions, path)


def keep_pictures(runs: Sequence[dict[str, Any]], home: Path, results: Path) -> None:
    """Beside the results, of the first seed's hacked runs that are in `home`: how each went, its pictures at the first
    alarm, and what all defences of a reward have led to."""
    last: dict[str, dict[str, Path]] = {}
    for run in runs:
        kind, _, defence = run["run"].partition("+")
        looks = home / f"{run['run']}-{run['seed']}" / "looks"
        if run["seed"] != 0 or not looks.is_dir():
            continue
        base, end = looks / "000000.png", looks / f"{run['looks'][-1]['iteration']:06d}.png"
        last.setdefault(kind, {"base": base})[DEFENCES[defence].about.replace(", ", ",\n")] = end
        if not defence and KINDS[kind].reward:
            shutil.copy(looks.parent / "progress.png", results / f"hacking_{kind}_progress.png")
            if (alarm := first_alarm(unaided(run["looks"]))) is not None:
                at = {"base": base, f"alarm at {alarm[0]}": looks / f"{alarm[0]:06d}.png", "end": end}
                strip(at, results / f"hacking_{kind}_alarm.png")
    for kind, columns in last.items():
        if len(columns) > 2:
            strip(columns, results / f"hacking_{kind}_defences.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--home", type=Path, default=Path("runs/hacking"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = RESULTS / ("gpu" if torch.cuda.is_available() else "cpu")
    path = results / "hacking.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    for seed, run in itertools.product(options.seeds, [] if options.table else options.runs):
        settings = settings_of(run, seed)
        if all(one["settings"] != settings for one in runs):
            folder = train(run, seed, options.home, settings)
            runs = [one for one in runs if (one["run"], one["seed"]) != (run, seed)]
            runs.append(outcome(run, seed, folder, settings))
            runs.sort(key=lambda one: (RUNS.index(one["run"]), one["seed"]))
            path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    runs = current(runs)
    keep_pictures(runs, options.home, results)
    alarmed, defended = alarm_table(runs), defence_table(runs)
    print(f"{alarmed}\n\n{defended}")
    replace_part("hacking", alarmed, PAGE)
    replace_part("hacking --table", defended, PAGE)


if __name__ == "__main__":
    main()
