"""Whether two checkouts compute the same: `python -m benchmarks.same_metrics BEFORE AFTER [--only NAME …]`.

Trains three iterations of each case below in both checkouts, on one thread, with the engine's choices fixed, and
compares their `metrics.jsonl` value for value, but for seconds, rates and memory. A last case resumes in AFTER what
BEFORE has begun. Ends with status 1 where anything differs. Some ten minutes on one core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLOCK = ("_s", "_mib", "tflops", "mfu", "imbalance", "processes")
"""How the names of metrics end that depend on the clock or on memory."""
FIXED = ["--engine.attention", "native", "--engine.linear", "torch", "--engine.compile", "off", "--device", "cpu"]
SHORT = ["--evaluation.images", "8", "--prompt-cache", "off"]
OFFLINE = ["--data.offline-groups", "32"]
CASES: dict[str, tuple[int, list[str]]] = {
    "tiny-shapes": (1, ["tiny-shapes"]),
    "tiny-ocr": (1, ["tiny-ocr"]),
    "tiny-shapes-offline": (1, ["tiny-shapes-offline", *OFFLINE]),
    "tiny-shapes-diffusion-dpo": (1, ["tiny-shapes-diffusion-dpo"]),
    "tiny-shapes-flow-grpo": (1, ["tiny-shapes-flow-grpo", "--rollout.groups", "4"]),
    "lora, micro-batches below a group": (
        1,
        ["tiny-shapes", "--policy.train", "lora", "--policy.micro-batch", "12", "--dgpo.clip-range", "0.01"],
    ),
    "two processes": (2, ["tiny-shapes"]),
    "two processes, a group split": (2, ["tiny-shapes", "--rollout.groups", "3"]),
    "two processes, sharded": (2, ["tiny-shapes", "--distributed.shard", "full", "--rollout.groups", "5"]),
}
"""Processes and command line of each case."""
RESUMED = "begun before, resumed after"
Both = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def train(checkout: Path, folder: Path, processes: int, arguments: list[str]) -> None:
    """One command in `folder` by the code of `checkout`."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}:{checkout / 'kernels'}", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "dgpo_fast.train", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def results(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in line.items() if not name.endswith(CLOCK) and "per_s" not in name}
        for line in lines
    ]


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """What is not the same, a line each."""
    if len(before) != len(after):
        return [f"{len(before)} iterations, then {len(after)}"]
    return [
        f"iteration {number}, {name}: {old.get(name)!r}, then {new.get(name)!r}"
        for number, (old, new) in enumerate(zip(before, after, strict=True), 1)
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def run_both(checkouts: list[Path], folder: Path, name: str) -> Both:
    """The metrics of the case `name` in both checkouts."""
    processes, arguments = CASES[name]
    for checkout, run in zip(checkouts, ("before", "after"), strict=True):
        train(checkout, folder, processes, [*arguments, *FIXED, *SHORT, "--iterations", "3", "--name", run])
    return results(folder / "runs/before"), results(folder / "runs/after")


def resume(checkouts: list[Path], folder: Path, name: str) -> Both:
    """The metrics of a run of three iterations, and of one whose third was done by the other checkout."""
    before, after = checkouts
    # A learning rate that falls depends on how many iterations there are to be.
    settings = ["tiny-shapes", *FIXED, *SHORT, "--optimizer.lr-decay", "none"]
    train(before, folder, 1, [*settings, "--iterations", "3", "--name", "before"])
    train(before, folder, 1, [*settings, "--iterations", "2", "--name", "after"])
    train(after, folder, 1, ["--resume", "runs/after", "--iterations", "3"])
    return results(folder / "runs/before"), results(folder / "runs/after")


def main() -> int:
    """Runs the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of these cases: {', '.join([*CASES, RESUMED])}")
    options = parser.parse_args()
    checkouts = [options.before.resolve(), options.after.resolve()]
    status = 0
    for name in options.only or [*CASES, RESUMED]:
        with tempfile.TemporaryDirectory() as scratch:
            found = differences(*(resume if name == RESUMED else run_both)(checkouts, Path(scratch), name))
        print(f"{name}: {'; '.join(found) or 'equal'}", flush=True)
        status = 1 if found else status
    return status


if __name__ == "__main__":
    raise SystemExit(main())
