"""What a base in 8 or 4 bits changes (docs/performance.md): pictures, reward and gradient, and the gain of training.

    python -m benchmarks.quantised_base [--seeds 0 1 2] [--iterations 16] [--groups 4] [--images 256]
    python -m benchmarks.quantised_base --table

Trains a LoRA on the shipped pipeline with its base in the run's precision, in 8 bits and in 4. Before training, the
same prompts and noise are drawn with each base, and each has the gradient of the same images: those of the first
iteration on the base that is not rounded. Runs of one seed draw the same prompts and noise.

Writes `benchmarks/results/<cpu or gpu>/quantised_base.json` after each run; runs that are in it with the same settings
are not trained again.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.first_light import RESULTS, machine, short_runs_parser
from benchmarks.pages import PERFORMANCE, replace_part
from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.evaluation.statistics import mean_with_ci95
from dgpo_fast.models.quantised import numel, quantised_layers
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.trainer import Trainer

CPU_RESULT = RESULTS / "cpu/quantised_base.json"
RECIPE = ["tiny-shapes", "--policy.train", "lora"]
BASES = ("same", "int8", "nf4")
BITS = {"same": "fp32", "int8": "8 bits", "nf4": "4 bits"}


def trainer_on(base: str, settings: list[str]) -> Trainer:
    """A run that has not begun."""
    return Trainer(build(configure([*RECIPE, *settings, "--policy.base-precision", base])))


def gradient(trainer: Trainer, batch: Batch) -> Tensor:
    """Of all trained weights, as one vector."""
    weights = trainer.models.weights.values()
    for weight in weights:
        weight.grad = None
    trainer.learner.objective.accumulate(batch, trainer.models, trainer.learner.old.weights)
    found = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).double()
    for weight in weights:
        weight.grad = None
    return found


def first_batch(trainer: Trainer) -> Batch:
    """What the first iteration learns from."""
    return trainer.batches(trainer.source.collect(0), 0)[0]


def differences(settings: list[str]) -> dict[str, dict[str, Any]]:
    """What each base changes before training, by its name."""
    rows: dict[str, dict[str, Any]] = {}
    exact: tuple[Evaluation, Batch, Tensor] | None = None
    for base in BASES:
        trainer = trainer_on(base, settings)
        try:
            drawn = trainer.evaluations.scores(trainer.models.initial_weights(), begun=False)
            batch = first_batch(trainer) if exact is None else exact[1]
            of_base = gradient(trainer, batch)
            layers = quantised_layers(trainer.models.base)
            rounded = sum(layer.in_features * layer.out_features for layer in layers)
            row = {"rounded_share": rounded / numel(trainer.models.base), **_score(drawn)}
            if exact is None:
                exact = drawn, batch, of_base
            else:
                row |= _apart(drawn, of_base, *exact)
            rows[base] = row
        finally:
            trainer.close()
    return rows


def _score(drawn: Evaluation) -> dict[str, Any]:
    summary = drawn.summary()
    return {"reward": summary["reward_mean"], "reward_ci95": summary["reward_ci95"]}


def _apart(drawn: Evaluation, of_base: Tensor, exact: Evaluation, batch: Batch, plain: Tensor) -> dict[str, Any]:
    texts = [prompt.text for prompt in drawn.prompts]
    pictures = np.abs(drawn.images.astype(np.float64) - exact.images).mean((1, 2, 3))
    mean, interval = mean_with_ci95(pictures, texts)
    gain, gain_interval = mean_with_ci95(drawn.rewards.astype(np.float64) - exact.rewards, texts)
    return {
        "pictures": mean,
        "pictures_ci95": interval,
        "reward_difference": gain,
        "reward_difference_ci95": gain_interval,
        "gradient_error": float(torch.linalg.norm(of_base - plain) / torch.linalg.norm(plain)),
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(of_base, plain, dim=0)),
    }


def run(base: str, settings: list[str]) -> dict[str, Any]:
    """One whole run: held-out rewards before and after, and the gain picture by picture."""
    trainer = trainer_on(base, settings)
    with tempfile.TemporaryDirectory() as folder:
        try:
            before = trainer.evaluations.scores(trainer.models.initial_weights(), begun=False)
            trainer.prepare(Path(folder), lambda: False)
            trainer.open_logs(Path(folder), {})
            trainer.console.start_training(0, trainer.config.iterations)
            for _ in range(trainer.config.iterations):
                trainer.step()
            after = trainer.evaluate()
        finally:
            trainer.close()
    gain = after.gain(before)
    assert gain is not None
    return {
        "before": before.summary()["reward_mean"],
        "after": after.summary()["reward_mean"],
        "gain": gain["reward_mean"],
        "gain_ci95": gain["reward_ci95"],
    }


def tables(report: dict[str, Any]) -> str:
    """As Markdown: before training, and the gains of each seed with their 95 % intervals over prompts."""
    head = ["base", "pictures apart, of 255", "reward", "reward minus that in fp32", "gradient's error", "its cosine"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for base, row in report["before_training"].items():
        cells = [BITS[base], "", _interval(row, "reward"), "", "", ""]
        if base != "same":
            cells[1], cells[3] = _interval(row, "pictures"), _interval(row, "reward_difference", "+")
            cells[4:] = [f"{row['gradient_error']:.1%}", f"{row['gradient_cosine']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted({one["seed"] for one in report["runs"]})
    about = report["machine"]
    lines += ["", f"| base | {' | '.join(f'gain, seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    for base in BASES:
        found = {one["seed"]: _interval(one, "gain", "+") for one in report["runs"] if one["base"] == base}
        lines.append(f"| {BITS[base]} | {' | '.join(found.get(seed, '') for seed in seeds)} |")
    lines += [
        "",
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}, {about['date']}: {_settings(report)}.",
    ]
    return "\n".join(lines)


def _settings(report: dict[str, Any]) -> str:
    return f"`tiny-shapes --policy.train lora {' '.join(report['settings'])}`"


def _interval(row: dict[str, Any], name: str, sign: str = "") -> str:
    low, high = row[f"{name}_ci95"]
    return f"{row[name]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def measure(path: Path, options: argparse.Namespace) -> None:
    """Trains what `path` does not have, and adds it."""
    settings = ["--iterations", str(options.iterations), "--rollout.groups", str(options.groups)]
    settings += ["--evaluation.images", str(options.images), "--device", options.device]
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    report = there if there.get("settings") == settings else {"machine": machine(), "settings": settings, "runs": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    if "before_training" not in report:
        report["before_training"] = differences([*settings, "--seed", str(options.seeds[0])])
    done = {(one["base"], one["seed"]) for one in report["runs"]}
    for seed in options.seeds:
        for base in BASES:
            if (base, seed) not in done:
                found = run(base, [*settings, "--seed", str(seed)])
                report["runs"].append({"base": base, "seed": seed, **found})
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(args: list[str] | None = None) -> None:
    parser = short_runs_parser(__doc__)
    options = parser.parse_args(args)
    path = (options.out or RESULTS / ("gpu" if options.device.startswith("cuda") else "cpu")) / "quantised_base.json"
    if not options.table:
        measure(path, options)
    found = tables(json.loads(path.read_text(encoding="utf-8")))
    print(found)
    if path == CPU_RESULT:
        replace_part("quantised_base", found, PERFORMANCE)


if __name__ == "__main__":
    main()
