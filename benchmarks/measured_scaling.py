"""Strong and weak scaling on CPU processes, and how much of an iteration is communication, against the model on paper.

    python -m benchmarks.measured_scaling [--counts 1 2] [--iterations 12] [--setting value …]
    python -m benchmarks.measured_scaling --table

Strong: the recipe's groups are shared by the processes. Weak: each process has as many groups as one alone. Each
process has one thread; the machine should be idle and have a core for each. The model is that of
`benchmarks/scaling.py`, its link measured here: sums of tensors of several sizes over the same processes. A process
that comes later waits less, so the pure communication is that of the process that communicated shortest, iteration by
iteration.

Writes `benchmarks/results/cpu/scaling.json` and the table in `docs/scaling.md`; `--table` writes only the table.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.pages import replace_part
from benchmarks.scaling import BYTES, Link
from dgpo_fast.config.command_line import configure
from dgpo_fast.distributed import connect
from dgpo_fast.models.loading import read_model
from dgpo_fast.run.metrics import read_metrics, write_json
from tests.processes import run_together

RESULTS = Path(__file__).parent / "results/cpu/scaling.json"
RECIPE = "tiny-shapes"
SIZES = (2**10, 2**14, 2**17, 2**20, 2**22, 2**23)
"""Elements of the sums that measure the link."""
REPEATS = 15
WARM_UP = 2
"""Iterations that are left out."""


def measure_link(count: int) -> tuple[Link, list[dict[str, float]]]:
    """The link between `count` processes, fitted to sums of several sizes."""
    (text, *_) = run_together(["-m", "benchmarks.measured_scaling", "--sums"], count)
    sums = json.loads(text.strip().splitlines()[-1])
    # t = 2(n − 1)(size/n/bandwidth + latency), every size being weighted alike.
    rows = np.array([[2 * (count - 1) / count * one["bytes"], 2 * (count - 1)] for one in sums])
    seconds = np.array([one["seconds"] for one in sums])
    (per_byte, latency), _ = nnls(rows / seconds[:, None], np.ones(len(sums)))
    return Link(1 / per_byte if per_byte else float("inf"), float(latency)), sums


def time_sums() -> None:
    """One process of those that `measure_link` starts."""
    us, found = connect(120), []
    for size in SIZES:
        tensor, seconds = torch.ones(size), []
        for _ in range(REPEATS):
            us.gather(0, "the others")
            started = time.perf_counter()
            us.sum(tensor.zero_(), "a sum")
            seconds.append(time.perf_counter() - started)
        found.append({"bytes": size * BYTES, "seconds": max(us.gather(statistics.median(seconds), "the seconds"))})
    us.close()
    print(json.dumps(found))


@dataclass(frozen=True)
class Case:
    """One way to run: so many processes, each with its share of so many groups."""

    kind: str
    count: int
    groups: int


def measure(case: Case, iterations: int, settings: list[str]) -> dict[str, Any]:
    """Seconds, images a second and communication of a run: medians over its iterations."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            RECIPE,
            "--runs-dir",
            scratch,
            "--name",
            "run",
            "--iterations",
            str(iterations),
            "--evaluation.images",
            "8",
            *settings,
            "--rollout.groups",
            str(case.groups),
        ]
        run_together(["-m", "dgpo_fast.train", *arguments], case.count)
        lines = read_metrics(Path(scratch) / "run/metrics.jsonl")[WARM_UP:]
    communicate = [min(each["communicate_s"] for each in line.get("processes", [line])) for line in lines]
    iteration_s = statistics.median(line["iteration_s"] for line in lines)
    communicate_s = statistics.median(communicate)
    return {
        "kind": case.kind,
        "processes": case.count,
        "groups": case.groups,
        "iterations": len(lines),
        "iteration_s": iteration_s,
        "images_per_s": statistics.median(line["images_per_s"] for line in lines),
        "communicate_s": communicate_s,
        "communicate_fraction": communicate_s / iteration_s,
        "waited_fraction": statistics.median(line.get("waited_s", 0.0) / line["iteration_s"] for line in lines),
        "imbalance": statistics.median(line.get("imbalance", 1.0) for line in lines),
    }


def table(report: dict[str, Any]) -> str:
    """In Markdown."""
    rows = [
        "| scaling | processes | groups | iteration | images/s | efficiency | communication | by the model | waiting |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in report["cases"]:
        cells = [
            case["kind"],
            str(case["processes"]),
            str(case["groups"]),
            f"{case['iteration_s']:.2f} s",
            f"{case['images_per_s']:.1f}",
            f"{case['efficiency']:.0%}",
            f"{1e3 * case['communicate_s']:.1f} ms, {case['communicate_fraction']:.2%}",
            f"{1e3 * case['model_s']:.1f} ms, {case['model_fraction']:.2%}",
            f"{case['waited_fraction']:.1%}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--sums", action="store_true", help=argparse.SUPPRESS)
    args, settings = parser.parse_known_args()
    if args.sums:
        time_sums()
        return
    if args.table:
        replace_part("measured_scaling", table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    config = configure([RECIPE, *settings])
    groups = config.rollout.groups
    parameters = sum(weight.numel() for weight in read_model(config).build_transformer().parameters())
    links, sums = {}, {}
    for count in filter(lambda count: count > 1, args.counts):
        links[count], sums[count] = measure_link(count)
    cases = []
    for kind in ("strong", "weak"):
        for count in args.counts:
            case = Case(kind, count, groups if kind == "strong" else groups * count)
            found = measure(case, args.iterations, settings)
            model_s = links[count].all_reduce_s(parameters * BYTES, count) if count > 1 else 0.0
            found |= {"model_s": model_s, "model_fraction": model_s / found["iteration_s"]}
            alone = next((one for one in cases if one["kind"] == kind), found)
            found["efficiency"] = found["images_per_s"] / alone["images_per_s"] * alone["processes"] / count
            cases.append(found)
            print(json.dumps(found), flush=True)
    report = {
        "recipe": RECIPE,
        "settings": settings,
        "trained_weights": parameters,
        "links": {
            count: {"bytes_per_s": link.bytes_per_s, "latency_s": link.latency_s, "sums": sums[count]}
            for count, link in links.items()
        },
        "cases": cases,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, report)
    if args.out == RESULTS:
        replace_part("measured_scaling", table(report))
    print(table(report))


if __name__ == "__main__":
    main()
