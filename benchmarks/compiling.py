"""What compiled blocks save on a CPU, and what compiling takes: the constants of `dgpo_fast/engine/choices.py`.

    python -m benchmarks.compiling [--pairs 3] [--iterations 8] [--setting value …]

Runs the default recipe with and without `engine.compile`, in turns, each time with an empty compiler's cache. Takes
about ten minutes on two cores, which must be idle otherwise. Writes `compiling.json` and the table in
docs/performance.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import PERFORMANCE, replace_part
from dgpo_fast.config.command_line import configure
from dgpo_fast.engine.choices import COMPILED_SHARE, COMPILING_IMAGES
from dgpo_fast.profiling.machine import commit, cpu_name

RESULT = Path(__file__).parent / "results/cpu/compiling.json"


def one_run(compiled: str, iterations: int, settings: list[str]) -> dict[str, float]:
    """Median seconds of an iteration, the first one left out, and what the run takes beside its iterations."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dgpo_fast.train", "--iterations", str(iterations), "--name", "run"]
        command += ["--evaluation.images", "2", "--runs-dir", folder, "--engine.compile", compiled, *settings]
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        started = time.perf_counter()
        subprocess.run(["env", *map("=".join, environment.items()), *command], check=True, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - started
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    iteration_s = statistics.median(line["iteration_s"] for line in lines[1:])
    return {"iteration_s": iteration_s, "rest_s": wall_s - iterations * iteration_s}


def summary(report: dict[str, Any]) -> dict[str, float]:
    """The time of a compiled iteration over that of another one; and compiling, in seconds and in images' time."""
    runs = report["runs"]
    eager_s, compiled_s = (statistics.median(run["iteration_s"] for run in runs[name]) for name in ("off", "on"))
    eager_rest_s, rest_s = (statistics.median(run["rest_s"] for run in runs[name]) for name in ("off", "on"))
    compiling_s = rest_s - eager_rest_s
    image_s = eager_s / report["images_per_iteration"]
    return {"share": compiled_s / eager_s, "compiling_s": compiling_s, "compiling_images": compiling_s / image_s}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, beside the constants."""
    found = summary(report)
    count = len(report["runs"]["on"])
    medians = f"medians of {count} runs each" if count > 1 else "one run each"
    about = f"{report['machine']}, torch {report['torch']}, commit {report['commit']}, {report['date']}"
    return "\n".join(
        [
            "| | measured | what `auto` reckons with |",
            "|---|---|---|",
            f"| time of a compiled iteration over that of another | {found['share']:.2f} | {COMPILED_SHARE:g} |",
            f"| compiling, in the time of an image | {found['compiling_images']:.0f} | {COMPILING_IMAGES} |",
            "",
            f"Compiling took {found['compiling_s']:.0f} s with an empty compiler's cache; {medians}. {about}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT, help="with another file than the default, docs stay")
    options, settings = parser.parse_known_args()
    rollout = configure(settings).rollout
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": cpu_name()}
    report |= {"torch": torch.__version__, "settings": settings, "runs": {"off": [], "on": []}}
    report["images_per_iteration"] = rollout.groups * rollout.group_size
    for _ in range(options.pairs):
        for compiled, runs in report["runs"].items():
            runs.append(one_run(compiled, options.iterations, settings))
            print(compiled, runs[-1], flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if options.out == RESULT:
        replace_part("compiling", table(report), PERFORMANCE)


if __name__ == "__main__":
    main()
