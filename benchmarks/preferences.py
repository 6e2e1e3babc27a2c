"""Preferences of a known judge: what each kind of them teaches the shipped pipeline (docs/preferences.md).

    python -m benchmarks.preferences [--runs ratings …] [--seeds 0 1 2] [--home runs/preferences] [--setting value …]
    python -m benchmarks.preferences --table

The base model draws pictures of training prompts once. The `shapes` reward judges them in the place of a person: it
rates every picture, compares the first with the second, the third with the fourth and so on where it can tell them
apart, and likes those that are right. Each kind is written as a `preferences.jsonl`, and a run learns from it alone:
no reward is asked in training. Held out are a fifth of the judged prompts, and beside them prompts of which no picture
was judged, whose pictures the `shapes` reward scores before and after.

Writes `benchmarks/results/<cpu or gpu>/preferences.json` after each run, and the table on the page.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.first_light import RESULTS, machine
from benchmarks.pages import DOCS, replace_part
from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.preferences import FILE, Judgement, append_judgement
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.trainer import Trainer

PAGE = DOCS / "preferences.md"
PROMPTS, PICTURES = 240, 8
"""Groups that the judge sees, and pictures in each."""
ALIKE = ("tiny-shapes", "--data.source", "preferences", "--eval-prompts", "tiny-shapes", "--rollout.group-size", "8")
SHORT = ("--iterations", "30", "--evaluation.images", "256", "--optimizer.lr", "2e-4")
"""Of every run. The evaluated prompts are those that the shipped recipe is evaluated on."""


@dataclass(frozen=True)
class Kind:
    """Runs on one kind of judgements.

    Attributes:
        about: what the table calls them.
        judged: the folder of the judgements.
        settings: of the run.
    """

    about: str
    judged: str
    settings: tuple[str, ...]


DGPO = ("--dgpo.kl-guidance-scale", "1", "--dgpo.kl-weight", "0.003", "--dgpo.timesteps", "2")
KINDS = {
    "ratings": Kind("ratings, `dgpo`", "ratings", DGPO),
    "repeated": Kind("ratings, `dgpo`, `data.noise_passes` 1", "ratings", (*DGPO, "--data.noise-passes", "1")),
    "pairs": Kind(
        "pairs, `diffusion_dpo`",
        "pairs",
        (
            "--objective",
            "diffusion_dpo",
            "--rollout.groups",
            "48",
            "--diffusion-dpo.beta",
            "30",
            "--diffusion-dpo.timesteps",
            "2",
        ),
    ),
    "likes": Kind(
        "likes, `kto`",
        "likes",
        ("--objective", "kto", "--rollout.groups", "128", "--kto.beta", "30", "--kto.timesteps", "2"),
    ),
}


def judge(home: Path) -> None:
    """Draws and judges the pictures, unless that is done."""
    if (home / "drawn").is_file():
        return
    arguments = ["tiny-shapes", "--rollout.groups", "20", "--rollout.group-size", str(PICTURES)]
    trainer = Trainer(build(configure(arguments)))
    for draw in range(PROMPTS // 20):
        (groups,) = trainer.source.collect(draw)
        images = trainer.sampler.decode(groups.x0).images.reshape(-1, PICTURES, *trainer.sampler.image_size, 3)
        correct = groups.scores.parts["shapes/correct"]
        for row, prompt in enumerate(groups.prompts):
            names = [home / "pictures" / f"{draw:02}-{row:02}-{number}.png" for number in range(PICTURES)]
            for name, image in zip(names, images[row], strict=True):
                name.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(name)
            for kind, judgement in judgements(prompt, names, groups.scores.rewards[row], correct[row]):
                append_judgement(home / kind / FILE, judgement)
    trainer.close()
    (home / "drawn").touch()


def judgements(
    prompt: Prompt, names: list[Path], rewards: np.ndarray, correct: np.ndarray
) -> Iterator[tuple[str, Judgement]]:
    """What is said of a group's pictures, with the folder that it belongs to."""
    for name, reward, is_right in zip(names, rewards, correct, strict=True):
        yield "ratings", Judgement(prompt, "rating", (name,), round(float(reward), 4))
        yield "likes", Judgement(prompt, "like", (name,), float(is_right))
    for one in range(0, len(names), 2):
        better, worse = (one, one + 1) if rewards[one] > rewards[one + 1] else (one + 1, one)
        if rewards[better] != rewards[worse]:
            yield "pairs", Judgement(prompt, "pair", (names[better], names[worse]))


def train(name: str, seed: int, home: Path, settings: list[str]) -> Path:
    """Trains one run to its end, or what is left of it; its folder."""
    kind, folder = KINDS[name], home / f"{name}-seed{seed}"
    if (folder / "summary.json").is_file():
        return folder
    if folder.is_dir():
        arguments = ["--resume", str(folder)]
    else:
        arguments = [*ALIKE, *SHORT, *kind.settings, "--data.preferences", str(home / kind.judged)]
        arguments += ["--data.folder", str(home / "latents"), "--seed", str(seed)]
        arguments += ["--runs-dir", str(home), "--name", folder.name, *settings]
    subprocess.run([sys.executable, "-m", "dgpo_fast.train", *arguments], check=True)
    return folder


def outcome(name: str, seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    """What the results file keeps of a run."""
    lines = read_metrics(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "run": name,
        "seed": seed,
        "settings": settings,
        "iterations": len(lines),
        "training_s": summary["training_s"],
        "iteration_s": [round(line["iteration_s"], 4) for line in lines],
        "judged_groups": summary["judged_groups"],
        "training_images": summary["training_images"],
        "held_out_preferences": summary["held_out_preferences"],
        **{
            when: {key: summary[when][key] for key in ("reward_mean", "reward_ci95")}
            for when in ("before", "after", "gain")
        },
        "machine": machine(),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as Markdown."""
    columns = ["learned from", "seed", "held-out preferences: agreement, 95 % interval", "reward before → after"]
    columns += ["gain, 95 % interval", "seconds an iteration"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in sorted(runs, key=lambda run: (list(KINDS).index(run["run"]), run["seed"])):
        kept = run["held_out_preferences"]
        measure = "likes_auc" if run["run"] == "likes" else "accuracy"
        low, high = kept[f"{measure}_ci95"]
        of = f"{kept['liked']} × {kept['disliked']} likes" if run["run"] == "likes" else f"{kept['pairs']} pairs"
        agreed = f"{100 * kept[measure]:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of {of}"
        gain, (least, most) = run["gain"]["reward_mean"], run["gain"]["reward_ci95"]
        scores = f"{run['before']['reward_mean']:.3f} → {run['after']['reward_mean']:.3f}"
        second = np.median(run["iteration_s"][len(run["iteration_s"]) // 2 :])
        cells = [KINDS[run["run"]].about, str(run["seed"]), agreed, scores]
        rows.append(f"| {' | '.join(cells)} | {gain:+.3f} ({least:+.3f} to {most:+.3f}) | {second:.2f} |")
    iterations = " and ".join(map(str, sorted({run["iterations"] for run in runs})))
    rows += ["", f"{iterations} iterations each; 50 % is chance. Seconds are medians of a run's later half."]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--home", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--table", action="store_true")
    options, settings = parser.parse_known_args()
    path = RESULTS / ("gpu" if torch.cuda.is_available() else "cpu") / "preferences.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    if not options.table:
        judge(options.home)
        for seed in options.seeds:
            for name in options.runs:
                folder = train(name, seed, options.home, settings)
                runs = [run for run in runs if (run["run"], run["seed"]) != (name, seed)]
                runs.append(outcome(name, seed, folder, settings))
                path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(table(runs))
    replace_part("preferences", table(runs), PAGE)


if __name__ == "__main__":
    main()
