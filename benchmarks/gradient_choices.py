"""What each choice of the gradient that departs from the releases is worth (docs/method.md).

    python benchmarks/gradient_choices.py [--seeds 0 1 2] [--iterations 16] [--groups 4] [--images 256]
    python benchmarks/gradient_choices.py --table

Trains the shipped pipeline with the default choices and with one released choice at a time. Runs of one seed start from
the same weights, draw the same prompts and the same noise, and are evaluated on the same held-out noise. DGPO has
`tiny-shapes`, whose KL term has guidance; Flow-GRPO has `tiny-shapes-flow-grpo` with guidance in rollouts and
evaluations, without which its choice changes nothing.

Writes `benchmarks/results/<cpu or gpu>/gradient_choices.json` after each run; runs that are in it with the same
settings are not trained again.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this folder has a `kernels.py`, which would stand before a library

import numpy as np

from benchmarks.first_light import RESULTS, machine, short_runs_parser
from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.trainer import Trainer

GUIDED = ["--rollout.guidance-scale", "3", "--evaluation.guidance-scale", "3"]
ARMS = {"DGPO": ["tiny-shapes"], "Flow-GRPO, guided": ["tiny-shapes-flow-grpo", *GUIDED]}
"""What is trained: a recipe and further settings."""
CHOICES: dict[str, list[list[str]]] = {
    "DGPO": [[], ["--dgpo.guided-reference", "true"], ["--dgpo.training-sigma", "timestep"]],
    "Flow-GRPO, guided": [[], ["--flow-grpo.unconditional-gradient", "false"]],
}
"""Settings of each choice; the default one is first."""


def before(arm: str, settings: list[str]) -> float:
    """The held-out reward of the shipped weights, which all runs start from."""
    trainer = Trainer(build(configure([*ARMS[arm], *settings])))
    reward = float(trainer.evaluate().summary()["reward_mean"])
    trainer.close()
    return reward


def run(arm: str, choice: list[str], settings: list[str]) -> dict[str, Any]:
    """The rewards of one run, and its held-out reward."""
    trainer = Trainer(build(configure([*ARMS[arm], *settings, *choice])))
    with tempfile.TemporaryDirectory() as folder:
        trainer.prepare(Path(folder), lambda: False)
        trainer.open_logs(Path(folder), {})
        trainer.console.start_training(0, trainer.config.iterations)
        for _ in range(trainer.config.iterations):
            trainer.step()
        lines = read_metrics(Path(folder) / "metrics.jsonl")
        after = trainer.evaluate().summary()
    trainer.close()
    return {
        "after": after["reward_mean"],
        "after_ci95": after["reward_ci95"],
        "reward_mean": [line["reward_mean"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
    }


def rows(report: dict[str, Any]) -> list[str]:
    """A Markdown table: held-out rewards by seed, and what a released choice adds to the default one."""
    runs = report["runs"]
    seeds = sorted({one["seed"] for one in runs})
    head = ["trained with", "choice", *(f"seed {seed}" for seed in seeds), "mean", "less the default"]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, choices in CHOICES.items():
        of_arm = [one for one in runs if one["arm"] == arm]
        table.append(_row(arm, "before training", seeds, dict.fromkeys(seeds, report["before"][arm]), None))
        default = _after(of_arm, choices[0])
        for choice in choices:
            table.append(_row(arm, _name(choice), seeds, _after(of_arm, choice), default if choice else None))
    return table


def _after(runs: list[dict[str, Any]], choice: list[str]) -> dict[int, float]:
    return {one["seed"]: one["after"] for one in runs if one["choice"] == choice}


def _name(choice: list[str]) -> str:
    return f"`{' '.join(choice)}`" if choice else "default"


def _row(arm: str, name: str, seeds: list[int], rewards: dict[int, float], default: dict[int, float] | None) -> str:
    """The difference is the mean over seeds, with its standard error."""
    cells = [f"{rewards[seed]:.3f}" for seed in seeds]
    less = ""
    if default is not None:
        apart = np.array([rewards[seed] - default[seed] for seed in seeds])
        less = f"{apart.mean():+.3f} ± {apart.std(ddof=1) / np.sqrt(len(apart)):.3f}"
    return f"| {arm} | {name} | {' | '.join(cells)} | {np.mean([rewards[seed] for seed in seeds]):.3f} | {less} |"


def main() -> None:
    parser = short_runs_parser(__doc__)
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds: a standard error needs two seeds at least")
    folder = options.out or RESULTS / ("gpu" if options.device.startswith("cuda") else "cpu")
    path = folder / "gradient_choices.json"
    if not options.table:
        measure(path, options)
    print("\n".join(rows(json.loads(path.read_text(encoding="utf-8")))))


def measure(path: Path, options: argparse.Namespace) -> None:
    """Trains what `path` does not have, and adds it."""
    settings = ["--iterations", str(options.iterations), "--rollout.groups", str(options.groups)]
    settings += ["--evaluation.images", str(options.images), "--device", options.device]
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "before": {}, "runs": []}
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        report = there if there["settings"] == settings else report
    done = {(one["arm"], tuple(one["choice"]), one["seed"]) for one in report["runs"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm, choices in CHOICES.items():
            if arm not in report["before"]:
                report["before"][arm] = before(arm, settings)
            for choice in choices:
                if (arm, tuple(choice), seed) in done:
                    continue
                found = run(arm, choice, [*settings, "--seed", str(seed)])
                report["runs"].append({"arm": arm, "choice": choice, "seed": seed, **found})
                path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
