"""Runs a recipe for several seeds, each in a process of its own, and keeps what came out.

    python benchmarks/first_light.py [RECIPE] [--seeds 0 1 2] [--setting value …]
    python benchmarks/first_light.py [RECIPE] --search --seeds 0 [--setting value …]
    python benchmarks/first_light.py [RECIPE] --table

The first writes `benchmarks/results/<cpu or gpu>/<recipe>.json` (before, after and seconds of each seed, the machine,
the commit) and the first seed's pictures. The second adds a line to `<recipe>_search.jsonl`, the log of what was
tried, and the third prints that log as a table. Further settings are handed on to `python -m dgpo_fast.train`.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dgpo_fast.profiling.machine import commit, cpu_name

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def short_runs_parser(about: str | None) -> argparse.ArgumentParser:
    """Of a benchmark that trains the shipped pipeline briefly, once for each of its cases and seeds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a folder in place of that of the results")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    return parser


def run_name(recipe: str, seed: int) -> str:
    """What its folder is called; `recipe` may be a file."""
    return f"{Path(recipe).stem}-seed{seed}"


def run(recipe: str, seed: int, runs_dir: Path, settings: list[str]) -> dict[str, Any]:
    """One whole run as a user starts it: imports, evaluations and saving are in its seconds."""
    name = run_name(recipe, seed)
    command = [sys.executable, "-m", "dgpo_fast.train", recipe, "--seed", str(seed)]
    command += ["--runs-dir", str(runs_dir), "--name", name, *settings]
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    metrics = [json.loads(line) for line in (runs_dir / name / "metrics.jsonl").read_text("utf-8").splitlines()]
    cpu_s = round(sum(line["cpu_s"] for line in metrics), 1)
    summary = json.loads((runs_dir / name / "summary.json").read_text("utf-8"))
    return {"wall_s": round(seconds, 1), "training_cpu_s": cpu_s, **summary}


def log_search(path: Path, run: dict[str, Any], settings: list[str]) -> None:
    """Adds one tried setting to the log."""
    kept = {key: run[key] for key in ("seed", "wall_s", "training_cpu_s", "iterations", "training_s")}
    kept |= {scores: run[scores]["reward_mean"] for scores in ("before", "after", "gain")}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"settings": " ".join(settings), **kept, "machine": machine()}) + "\n")


def search_table(path: Path) -> str:
    """The log as Markdown, best first."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    columns = ["settings beside the recipe's", "data", "seed", "iterations", "seconds", "processor's"]
    columns += ["before", "after", "gain"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in sorted(lines, key=lambda line: -line["gain"]):
        tried = f"| `{line['settings'] or '(none)'}` | {line.get('data', '')} | {line['seed']} | {line['iterations']}"
        outcome = f"{line['before']:.3f} | {line['after']:.3f} | {line['gain']:+.3f} |"
        cpu_s = f"{line['training_cpu_s']:.0f}" if "training_cpu_s" in line else ""
        rows.append(f"{tried} | {line['training_s']:.0f} | {cpu_s} | {outcome}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--table", action="store_true")
    # Named only in the first place: elsewhere the value of a setting would be taken for it.
    named = sys.argv[1:] and not sys.argv[1].startswith("-")
    options, settings = parser.parse_known_args(sys.argv[1:] if named else ["tiny-shapes", *sys.argv[1:]])
    folder = RESULTS / ("gpu" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(options.recipe).stem
    log = folder / f"{name}_search.jsonl"
    if options.table:
        print(search_table(log))
        return
    runs, measured_on = [], machine()  # before the results make the checkout differ from its commit
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            one = run(options.recipe, seed, Path(scratch), settings)
            before, after, gain = (one[scores]["reward_mean"] for scores in ("before", "after", "gain"))
            print(f"seed {seed}: {before:.3f} → {after:.3f} ({gain:+.3f}) in {one['wall_s']:.0f} s")
            if options.search:
                log_search(log, one, settings)
                continue
            if not runs:
                for picture in ("before_after.png", "reward_curve.png"):
                    shutil.copy(Path(scratch) / run_name(options.recipe, seed) / picture, folder / f"{name}_{picture}")
            runs.append(one)
            report = {"recipe": options.recipe, "settings": settings, "machine": measured_on, "runs": runs}
            (folder / f"{name}.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
