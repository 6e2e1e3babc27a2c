"""Kills a run of several processes at random moments, resumes it each time, and compares its end with another's.

    python benchmarks/kills.py --kills 50 --processes 2

Every checkpoint folder that a kill leaves is read: the newest valid one is what `--resume` takes, and it must be whole.
Writes `benchmarks/results/cpu/kills.json`. Runs on CPU processes joined by gloo.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dgpo_fast.checkpoint import load_newest
from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_metrics, write_json
from tests.distributed_runs import make_workspace
from tests.pipelines import save_random_pipeline
from tests.processes import environments

RESULTS = Path(__file__).parent / "results/cpu/kills.json"
CLOCK = ("_s", "_mib", "tflops", "mfu")


def start(folder: Path, count: int, arguments: list[str]) -> list[subprocess.Popen]:
    """The processes of one run, as torchrun would start them."""
    command = [sys.executable, "-m", "dgpo_fast.train", *arguments]
    log = (folder / "log.txt").open("ab")
    return [subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log) for env in environments(count)]


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit statuses; what is left after `seconds` is killed, as torchrun does."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [process.returncode for process in processes]


def kill_once(folder: Path, count: int, iterations: int, rng: random.Random) -> dict:
    """Starts or resumes the run, kills one process at a random moment after training began, and looks at the disk."""
    run = folder / "runs/killed"
    resumed = (run / "config.yaml").exists() and any((run / "checkpoints").glob("iteration-*"))
    if not resumed:
        shutil.rmtree(run, ignore_errors=True)
    arguments = ["--resume", "runs/killed"] if resumed else ["small.yaml", "--name", "killed"]
    processes = start(folder, count, [*arguments, "--iterations", str(iterations)])
    checkpoints = run / "checkpoints"
    before = newest(checkpoints)
    while all(process.poll() is None for process in processes) and newest(checkpoints) <= before:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1.5))
    victim = rng.randrange(count)
    processes[victim].kill()
    statuses = wait(processes, 60)
    iteration, passed_over = -1, ["no checkpoint yet"]
    if checkpoints.is_dir():
        try:
            state, passed_over = load_newest(checkpoints)
            iteration = state.iteration
        except UserError as error:
            passed_over = [str(error)]
    half_written = len(list(checkpoints.glob(".iteration-*")))
    return {"victim": victim, "statuses": statuses, "resumes_after": iteration, "passed_over": passed_over,
            "half_written": half_written}  # fmt: skip


def newest(checkpoints: Path) -> int:
    """Number of the newest checkpoint, -1 without one."""
    return max((int(path.name[-6:]) for path in checkpoints.glob("iteration-*")), default=-1)


def comparable(run: Path) -> list[dict]:
    """The metrics that do not depend on the clock."""
    keep = lambda name, value: not name.endswith(CLOCK) and not isinstance(value, list) and name != "imbalance"  # noqa: E731
    return [
        {name: value for name, value in line.items() if keep(name, value)}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rng, iterations = random.Random(args.seed), 4 * args.kills + 4
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pipeline").mkdir()
        save_random_pipeline(folder / "pipeline")
        make_workspace(folder, folder / "pipeline")
        with (folder / "small.yaml").open("a") as file:
            file.write("checkpoint: {every: 1, keep: 3}\n")
        kills = []
        for number in range(args.kills):
            kills.append(kill_once(folder, args.processes, iterations, rng))
            print(f"kill {number + 1}/{args.kills}: {json.dumps(kills[-1])}", flush=True)
        # However far the kills let it come, both runs end at the same iteration.
        last = kills[-1]["resumes_after"] + 2
        ends = [wait(start(folder, args.processes, [*how, "--iterations", str(last)]), 3600)
                for how in (["--resume", "runs/killed"], ["small.yaml", "--name", "undisturbed"])]  # fmt: skip
        same = comparable(folder / "runs/killed") == comparable(folder / "runs/undisturbed")
        broken = sum(kill["resumes_after"] < 0 for kill in kills)
        report = {"processes": args.processes, "kills": kills, "iterations": last, "final_statuses": ends,
                  "metrics_equal_undisturbed": same, "kills_without_a_valid_checkpoint": broken}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, report)
    verdict = "equal" if same else "DIFFER FROM"
    print(f"{args.kills} kills of one of {args.processes} processes, {last} iterations: metrics {verdict} an "
          f"undisturbed run's; {broken} kills left no valid checkpoint")  # fmt: skip
    if not same or broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
