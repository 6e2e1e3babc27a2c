"""How much of a gradient is signal: why some systems of the comparison learn from fewer images than others.

    python benchmarks/gradient_signal.py [--batches 16]

Each system of `benchmarks.compare` draws independent batches of 16 groups of 16 images with the shipped pipeline's own
weights and computes the gradient of each. What two gradients of independent batches share is signal, the rest noise:
the signal's share of a squared gradient is the mean inner product of two of them over the mean squared norm. That of
Flow-GRPO is also taken apart by the steps of its rollout.

Writes `benchmarks/results/<cpu or gpu>/gradient_signal.json`; `--table` prints the file as Markdown.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this folder has a `kernels.py`, which would stand before a library

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare.systems import NORMAL, SYSTEMS, configuration
from benchmarks.first_light import RESULTS, machine
from dgpo_fast.build import build
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.flow_grpo import FlowGRPOObjective
from dgpo_fast.objectives.protocol import Objective
from dgpo_fast.trainer import Trainer

COMPARED = ("dgpo", "dgpo-sde", "dpo", "flow-grpo")
STAYS = 1e-30
"""A learning rate that leaves the weights where they are."""


class Recorded:
    """An objective whose gradients are kept.

    Attributes:
        gradients: by part ("all", and "step 0" … of Flow-GRPO), fp32, one a batch.
    """

    def __init__(self, inner: Objective):
        self.inner = inner
        self.optimizer_batches = inner.optimizer_batches
        self.gradients: dict[str, list[Tensor]] = {}

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        if isinstance(self.inner, FlowGRPOObjective):
            for step in range(batch.schedule.steps - 1):
                for rows in batch_slices(len(batch.x0), self.inner.micro_batch):
                    share = (rows.stop - rows.start) / batch.samples
                    (share * self.inner._loss(batch[rows], models, step, {}, batch.weight[rows])["loss"]).backward()
                self._keep(f"step {step}", models)
        metrics = self.inner.accumulate(batch, models, old)
        self._keep("all", models, drop=False)
        return metrics

    def _keep(self, part: str, models: PolicyModels, drop: bool = True) -> None:
        weights = models.weights.values()
        gradient = torch.cat([weight.grad.flatten().float() for weight in weights])  # type: ignore[union-attr]
        self.gradients.setdefault(part, []).append(gradient.cpu())
        if drop:
            for weight in weights:
                weight.grad = None


def gradients(system: str, batches: int, device: str) -> dict[str, Tensor]:
    """Gradients of independent batches by part, (batches, weights) each. No KL term: it is 0 at the start."""
    config = configuration(
        SYSTEMS[system], replace(NORMAL, images=16), lr=STAYS, groups=16, seed=0, evaluation_seed=0, device=device
    )
    config = replace(
        config,
        dgpo=replace(config.dgpo, kl_weight=0.0),
        flow_grpo=replace(config.flow_grpo, kl_weight=0.0, optimizer_steps=1),
    )
    trainer = Trainer(build(config))
    trainer.learner.objective = recorded = Recorded(trainer.learner.objective)
    with tempfile.TemporaryDirectory() as folder:
        trainer.prepare(Path(folder), lambda: False)
        trainer.open_logs(Path(folder), {})
        trainer.console.start_training(0, batches)
        for _ in range(batches):
            trainer.step()
    trainer.close()
    return {part: torch.stack(kept) for part, kept in recorded.gradients.items()}


def signal(gradient: Tensor) -> dict[str, float]:
    """The signal's share of (batches, weights) gradients, its standard error by the jackknife, and their norm."""
    products = (gradient.double() @ gradient.double().T).numpy()
    shares = [_share(np.delete(np.delete(products, left_out, 0), left_out, 1)) for left_out in range(len(products))]
    count = len(products)
    error = np.sqrt((count - 1) / count * np.square(np.array(shares) - np.mean(shares)).sum())
    return {"share": _share(products), "error": float(error), "norm": float(np.sqrt(np.trace(products) / count))}


def _share(products: np.ndarray) -> float:
    count, squares = len(products), np.trace(products)
    return float((products.sum() - squares) / (count * (count - 1)) / (squares / count))


def rows(found: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| gradient of | signal's share | norm |"
    yield "|---|---|---|"
    for system, parts in found.items():
        for part, numbers in sorted(parts.items()):
            name = SYSTEMS[system].label + ("" if part == "all" else f", {part}")
            yield f"| {name} | {numbers['share']:.4f} ± {numbers['error']:.4f} | {numbers['norm']:.2g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    options = parser.parse_args()
    if options.batches < 3:
        parser.error("--batches: an error needs three batches at least")
    path = RESULTS / ("gpu" if options.device.startswith("cuda") else "cpu") / "gradient_signal.json"
    if not options.table:
        found: dict[str, Any] = {}
        for system in COMPARED:
            parts = gradients(system, options.batches, options.device)
            found[system] = {part: signal(gradient) for part, gradient in parts.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "batches": options.batches, "images": 256, "systems": found}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(rows(json.loads(path.read_text(encoding="utf-8"))["systems"])))


if __name__ == "__main__":
    main()
