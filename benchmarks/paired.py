"""Whole runs of the default recipe with the engine's savings and without, in turns: `throughput.py paired`."""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000


def one_run(iterations: int, settings: Sequence[str]) -> dict[str, float]:
    """Median seconds of an iteration, the first one left out, and CPU seconds of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dgpo_fast.train", "--iterations", str(iterations), "--name", "run"]
        command += ["--evaluation.images", "2", "--runs-dir", folder, *settings]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "iteration_s": statistics.median(line["iteration_s"] for line in lines[1:]),
        "iteration_cpu_s": statistics.median(line["cpu_s"] for line in lines[1:]),
        "process_cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "groups_equal_count": statistics.mean(line["groups_equal_count"] for line in lines),
    }


def paired(pairs: int, iterations: int, savings: Mapping[str, Sequence[str]], settings: Sequence[str]) -> dict:
    """`pairs` of runs of `iterations` each; every other pair begins with the savings on.

    Ratios are off over on: of seconds, and of CPU seconds, which other programs on the machine disturb less.
    """
    off = [*settings, *savings["all settings of the engine"]]
    runs: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    one_run(2, settings)  # what is measured and encoded once on a machine
    for pair in range(pairs):
        for name in ("off", "on") if pair % 2 == 0 else ("on", "off"):
            runs[name].append(one_run(iterations, off if name == "off" else settings))
            print(name, {key: round(value, 3) for key, value in runs[name][-1].items()}, flush=True)
    return {
        "settings": {"off": off, "on": list(settings)},
        "pairs": pairs,
        "iterations": iterations,
        "runs": runs,
        "ratio": {
            key: ratio([run[key] for run in runs["off"]], [run[key] for run in runs["on"]])
            for key in ("iteration_s", "iteration_cpu_s")
        },
    }


def ratio(off: Sequence[float], on: Sequence[float]) -> dict[str, Any]:
    """Median of the pairs' ratios with its 95 % interval, by resampling the pairs."""
    ratios = np.array(off) / np.array(on)
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return {"median": float(np.median(ratios)), "interval": [float(low), float(high)], "pairs": ratios.tolist()}
