"""What rounding the weights to bf16 costs: full fine-tuning of the shipped pipeline from the same start, kept as

* fp32: fp32 weights, cast to bf16 at each forward;
* bf16_master: bf16 weights, the other half of an fp32 master beside them;
* bf16_stochastic: bf16 weights, rounded stochastically;
* bf16_nearest: bf16 weights, rounded to the nearest number, as plain bf16 training does.

    python benchmarks/rounding.py [--lrs 2e-4 2e-5] [--iterations 20] [--images 256] [--setting value …]

Every arm computes in bf16 and differs in nothing but the weights' storage. Writes
`benchmarks/results/<cpu or gpu>/rounding.json` and `rounding.png`; `--table` prints the file as Markdown.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from first_light import RESULTS, machine
from torch import Tensor

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.learning.optimizers import Bf16Optimizer
from dgpo_fast.learning.rounding import NearestRounding, Rounding
from dgpo_fast.trainer import Trainer

ARMS = ("fp32", "bf16_master", "bf16_stochastic", "bf16_nearest")


class Counted:
    """A rounding that counts the updates which leave a bf16 weight where it was."""

    def __init__(self, inner: Rounding):
        self.inner = inner
        self.lost = self.updates = 0

    def widen(self, index: int, weight: Tensor) -> Tensor:
        return self.inner.widen(index, weight)

    def narrow(self, index: int, value: Tensor, weight: Tensor, step: int) -> None:
        before, wanted = weight.clone(), value != self.inner.widen(index, weight)
        self.inner.narrow(index, value, weight, step)
        self.updates += int(wanted.sum())
        self.lost += int((wanted & (weight == before)).sum())


def kept(trainer: Trainer) -> Tensor:
    """All weights in one fp64 vector, with the lower halves of a master."""
    weights, optimizer = [weight.detach() for weight in trainer.models.weights.values()], trainer.learner.optimizer
    if isinstance(optimizer, Bf16Optimizer):
        weights = [optimizer.rounding.widen(index, weight) for index, weight in enumerate(weights)]
    return torch.cat([weight.double().flatten() for weight in weights])


def run(arm: str, lr: float, options: argparse.Namespace) -> dict[str, Any]:
    """One run; its reward curve, its held-out reward and where its weights went."""
    storage = "bf16_stochastic" if arm == "bf16_nearest" else arm
    settings = ["tiny-shapes", "--precision", "bf16", "--policy.weights", storage, "--optimizer.lr", str(lr)]
    settings += ["--iterations", str(options.iterations), "--evaluation.images", str(options.images)]
    settings += ["--ema.eval-decay-max", "0", "--seed", str(options.seed), *options.settings]
    trainer = Trainer(build(configure(settings)))
    optimizer, counted = trainer.learner.optimizer, None
    if isinstance(optimizer, Bf16Optimizer):
        counted = Counted(NearestRounding() if arm == "bf16_nearest" else optimizer.rounding)
        optimizer.rounding = counted  # type: ignore[assignment]
    start = kept(trainer)
    positions = []
    with tempfile.TemporaryDirectory() as folder:
        trainer.open_logs(Path(folder), {})
        trainer.console.start_training(0, options.iterations)
        for _ in range(options.iterations):
            trainer.step()
            positions.append((kept(trainer) - start).float())
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    heldout = trainer.evaluations.scores(trainer.models.weights).summary()
    trainer.close()
    found = {
        "arm": arm,
        "lr": lr,
        "reward_mean": [line["reward_mean"] for line in lines],
        "heldout_reward_mean": heldout["reward_mean"],
        "heldout_reward_ci95": heldout["reward_ci95"],
        "unchanged_share": counted.lost / counted.updates if counted else 0.0,
    }
    return {"positions": positions, **found}


def against_fp32(arm: dict[str, Any], fp32: dict[str, Any]) -> None:
    """Adds how far the weights are from those of fp32 after each step, and how much of its way they went."""
    distances, shares = [], []
    for mine, theirs in zip(arm["positions"], fp32["positions"], strict=True):
        distances.append(float((mine - theirs).norm() / theirs.norm()))
        shares.append(float(mine @ theirs / theirs.square().sum()))
    arm["distance"], arm["share_of_the_way"] = distances, shares


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    head = ["weights", "lr", "left as it was by an update", "distance from fp32", "share of its way", "held-out reward"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in report["runs"]:
        half = (r["heldout_reward_ci95"][1] - r["heldout_reward_ci95"][0]) / 2
        unchanged = "–" if r["arm"] == "fp32" else f"{r['unchanged_share']:.1%}"
        rows.append(
            f"| `{r['arm']}` | {r['lr']:g} | {unchanged} | {r['distance'][-1]:.3f} | {r['share_of_the_way'][-1]:.3f} "
            f"| {r['heldout_reward_mean']:.3f} ± {half:.3f} |"
        )
    return "\n".join(rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Distance from fp32's weights and share of its way, one column a learning rate."""
    rates = sorted({r["lr"] for r in report["runs"]}, reverse=True)
    figure, axes = plt.subplots(2, len(rates), figsize=(4.2 * len(rates), 5.2), sharex=True, squeeze=False)
    for column, lr in enumerate(rates):
        for r in report["runs"]:
            if r["lr"] == lr and r["arm"] != "fp32":
                steps = range(1, len(r["distance"]) + 1)
                axes[0][column].plot(steps, r["distance"], label=r["arm"])
                axes[1][column].plot(steps, r["share_of_the_way"], label=r["arm"])
        axes[0][column].set_title(f"learning rate {lr:g}")
        axes[0][column].set_ylim(bottom=0)
        axes[1][column].axhline(1.0, color="grey", linewidth=0.8)
        axes[1][column].set_xlabel("iteration")
    axes[0][0].set_ylabel("distance from fp32's weights\n÷ their way")
    axes[1][0].set_ylabel("share of fp32's way")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-4, 2e-5])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / ("gpu" if torch.cuda.is_available() else "cpu"))
    options, options.settings = parser.parse_known_args()
    path = options.out / "rounding.json"
    if options.table:
        print(table(json.loads(path.read_text())))
        return
    runs = []
    for lr in options.lrs:
        arms = [run(arm, lr, options) for arm in ARMS]
        for arm in arms:
            against_fp32(arm, arms[0])
        runs += [{key: value for key, value in arm.items() if key != "positions"} for arm in arms]
    report = {
        "machine": machine(),
        "settings": options.settings,
        "iterations": options.iterations,
        "seed": options.seed,
        "runs": runs,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, path.with_suffix(".png"))
    print(table(report))


if __name__ == "__main__":
    main()
