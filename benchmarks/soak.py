"""Trains for hours and looks whether anything grows: memory, open files, threads, or the seconds of an iteration.

    python -m benchmarks.soak [--recipe tiny-shapes] [--minutes 120] [--name soak] [--busy] [--setting value …]

The recipe trains for the given number of minutes with a checkpoint about every minute. It is sampled from outside
every few seconds, including its child processes. A straight line is fitted to each series after a warm-up. Its slope's
standard error comes from the means of blocks, since neighbouring samples are not independent. A series is flat if the
slope is within three standard errors of 0, or if it makes less than 1 % of the mean over the whole run.

Speed is measured twice: seconds on the wall, and seconds of the processors at work for an iteration, which other work
on the machine hardly changes. With `--busy`, if there is other work, the first are drawn but not judged.

Writes `benchmarks/results/cpu/NAME.json` and `NAME.png`. Ends with status 1 where something grows.
"""

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from dgpo_fast.run.metrics import read_metrics, write_json

RESULTS = Path(__file__).parent / "results/cpu"
CHECKPOINT_EVERY_S = 60.0
CALIBRATION_ITERATIONS = 5
WARM_UP = 0.1
"""Of the run, left out of the fits: caches fill, and the allocator finds its size."""
BLOCKS = 24
SMALL = 0.01
"""A change over the whole run, as a part of the mean, that is none."""
NAMES = {
    "rss_mib": "memory (RSS), MiB",
    "open_files": "open files",
    "threads": "threads",
    "cpu_s": "processor seconds an iteration",
    "iteration_s": "seconds an iteration on the wall",
}


@dataclass(frozen=True)
class Trend:
    """A straight line through a series.

    Attributes:
        mean: of the series.
        slope_per_hour: of the line.
        standard_error_per_hour: of the slope.
        change: what the slope makes over the series, as a part of the mean.
        blocks: independent values that were fitted.
    """

    mean: float
    slope_per_hour: float
    standard_error_per_hour: float
    change: float
    blocks: int

    @property
    def flat(self) -> bool:
        """Whether nothing grows."""
        return abs(self.slope_per_hour) <= 3 * self.standard_error_per_hour or abs(self.change) < SMALL


def fit(hours: Sequence[float], values: Sequence[float]) -> Trend:
    """The line through (hours, values), by least squares through the means of at most `BLOCKS` blocks."""
    blocks = min(BLOCKS, len(values) // 2)
    if blocks < 3:
        raise SystemExit(f"{len(values)} values are too few for a line: soak for longer")
    x, y = (np.array([part.mean() for part in np.array_split(np.asarray(v, float), blocks)]) for v in (hours, values))
    line, mean = stats.linregress(x, y), float(np.mean(values))
    change = float(line.slope) * (hours[-1] - hours[0]) / mean if mean else 0.0
    return Trend(mean, float(line.slope), float(line.stderr), change, blocks)


def sample(process: psutil.Process) -> dict[str, float]:
    """What a process and its children hold now, and the processor seconds that they have taken so far."""
    ended = process.cpu_times()
    held = {"rss_mib": 0.0, "open_files": 0.0, "threads": 0.0, "taken_s": ended.children_user + ended.children_system}
    for one in [process, *process.children(recursive=True)]:
        try:
            with one.oneshot():
                times = one.cpu_times()
                held["taken_s"] += times.user + times.system
                held["rss_mib"] += one.memory_info().rss / 2**20
                held["open_files"] += one.num_fds()
                held["threads"] += one.num_threads()
        except psutil.NoSuchProcess:
            continue  # a child that has just ended
    return held


def train(folder: Path, recipe: str, name: str, settings: list[str]) -> subprocess.Popen:
    """Begins a run without evaluations that would take long."""
    command = [sys.executable, "-m", "dgpo_fast.train", recipe, "--name", name, "--runs-dir", str(folder)]
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen([*command, *settings], stdout=log, stderr=subprocess.STDOUT)


def seconds_per_iteration(folder: Path, recipe: str, settings: list[str]) -> float:
    """By a short run."""
    short = ["--iterations", str(CALIBRATION_ITERATIONS), "--evaluation.images", "8", *settings]
    if train(folder, recipe, "calibration", short).wait():
        raise SystemExit((folder / "calibration.log").read_text()[-2000:])
    lines = read_metrics(folder / "calibration/metrics.jsonl")
    return statistics.median(line["iteration_s"] for line in lines[1:])


def soak(folder: Path, recipe: str, minutes: float, every_s: float, settings: list[str]) -> dict[str, Any]:
    """Trains and samples; the series, and what the run wrote."""
    iteration_s = seconds_per_iteration(folder, recipe, settings)
    checkpoint_every = max(1, round(CHECKPOINT_EVERY_S / iteration_s))
    iterations = int(10 * minutes * 60 / iteration_s)  # more than there is time for
    run = train(
        folder,
        recipe,
        "soak",
        [
            "--iterations",
            str(iterations),
            "--checkpoint.every",
            str(checkpoint_every),
            "--optimizer.lr-decay",
            "none",
            *settings,
        ],
    )
    process, metrics = psutil.Process(run.pid), folder / "soak/metrics.jsonl"
    while run.poll() is None and not (metrics.is_file() and read_metrics(metrics)):
        time.sleep(1)
    began, samples = time.time(), []
    while run.poll() is None and time.time() - began < 60 * minutes:
        done = metrics.read_bytes().count(b"\n")
        samples.append({"hours": (time.time() - began) / 3600, "iterations": done, **sample(process)})
        time.sleep(every_s)
    run.send_signal(signal.SIGTERM)
    status = run.wait()
    if status != 130:
        raise SystemExit(f"the run ended with status {status}:\n{(folder / 'soak.log').read_text()[-2000:]}")
    lines = read_metrics(metrics)
    ends = np.cumsum([line["iteration_s"] for line in lines]) / 3600
    return {
        "samples": samples,
        "work": work(samples),
        "iterations": [
            {"hours": float(hours), "iteration_s": line["iteration_s"]} for hours, line in zip(ends, lines, strict=True)
        ],
        "checkpoint_every": checkpoint_every,
        "checkpoints": len(lines) // checkpoint_every,
        "skipped_steps": sum(line["steps_skipped_count"] for line in lines),
        "log_bytes": (folder / "soak.log").stat().st_size,
    }


def work(samples: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Processor seconds an iteration, from the samples at which an iteration had just ended."""
    ends = [now for before, now in itertools.pairwise(samples) if now["iterations"] > before["iterations"]]
    return [
        {
            "hours": now["hours"],
            "cpu_s": (now["taken_s"] - before["taken_s"]) / (now["iterations"] - before["iterations"]),
        }
        for before, now in itertools.pairwise(ends)
    ]


def rows_of(seen: dict[str, Any], name: str) -> list[dict[str, float]]:
    """Where a series is."""
    return seen[{"iteration_s": "iterations", "cpu_s": "work"}.get(name, "samples")]


def series(seen: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Hours and values of one series, after the warm-up."""
    rows = rows_of(seen, name)
    warm = [row for row in rows if row["hours"] >= WARM_UP * rows[-1]["hours"]]
    return [row["hours"] for row in warm], [row[name] for row in warm]


def draw(seen: dict[str, Any], lines: dict[str, Trend], path: Path) -> None:
    """A panel for each series, with its line."""
    figure = Figure(figsize=(14, 6), layout="constrained", dpi=90)
    axes = np.ravel(figure.subplots(2, 3))
    axes[-1].remove()
    for axis, (name, label) in zip(axes[:-1], NAMES.items(), strict=True):
        rows = rows_of(seen, name)
        axis.plot([60 * row["hours"] for row in rows], [row[name] for row in rows], color="#8a8f98", linewidth=1)
        hours = series(seen, name)[0]
        line, middle = lines[name], float(np.mean(hours))
        ends = np.array([hours[0], hours[-1]])
        axis.plot(60 * ends, line.mean + line.slope_per_hour * (ends - middle), color="#1f6feb", linewidth=2)
        error = line.standard_error_per_hour  # not a number where all values are equal
        per_hour = f"{line.slope_per_hour:+.3g}{f' ± {error:.2g}' if error == error else ''} an hour"
        axis.set_title(f"{label}: {per_hour}{'' if line.flat else ', not flat'}", fontsize=10)
        axis.set_xlabel("minutes")
        low, high = min(row[name] for row in rows), max(row[name] for row in rows)
        margin = max(0.05 * line.mean, 0.1 * (high - low))  # noise must not look like growth
        axis.set_ylim(low - margin, high + margin)
        axis.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def thinned(rows: list[dict[str, float]], most: int = 240) -> list[dict[str, float]]:
    """Every so many rows, to keep the file small."""
    return [{name: round(value, 5) for name, value in row.items()} for row in rows[:: -(-len(rows) // most)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny-shapes")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every-s", type=float, default=2, help="between two samples")
    parser.add_argument("--busy", action="store_true", help="the machine has other work: seconds on the wall may vary")
    parser.add_argument("--name", default="soak")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        seen = soak(Path(scratch), args.recipe, args.minutes, args.every_s, settings)
    lines = {name: fit(*series(seen, name)) for name in NAMES}
    flat = all(line.flat for name, line in lines.items() if not (args.busy and name == "iteration_s"))
    report = {
        "recipe": args.recipe,
        "settings": settings,
        "minutes": args.minutes,
        "busy": args.busy,
        "flat": flat,
        "fits": {name: {**asdict(line), "flat": line.flat} for name, line in lines.items()},
        "iterations_count": len(seen["iterations"]),
        **seen,
        **{name: thinned(seen[name]) for name in ("iterations", "samples", "work")},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{args.name}.json", report)
    draw(seen, lines, args.out / f"{args.name}.png")
    print(json.dumps(report["fits"], indent=2))
    print(
        f"{report['iterations_count']} iterations, {report['checkpoints']} checkpoints: {'flat' if flat else 'GROWS'}"
    )
    raise SystemExit(0 if flat else 1)


if __name__ == "__main__":
    main()
