"""Kills a run of several processes again and again, resumes it each time, and compares its end with another run's.

    python -m benchmarks.kills --kills 50 --processes 2 [--folder WORKSPACE]

Every second kill (SIGKILL) hits a random process at a random moment, from its start on; the others hit process 0 while
it writes a checkpoint. After each, the folder is looked at: the newest valid checkpoint is what `--resume` takes, and
none that has a checkpoint's name may be broken. Writes `benchmarks/results/cpu/kills.json` and a sentence in
`docs/scaling.md`.

The processes are forked from one that has imported everything, so that 50 of them take minutes. What is done in a
`--folder` can be stopped (Ctrl-C) and continued.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from benchmarks.disturbed import comparable, workspace
from benchmarks.pages import replace_part
from dgpo_fast.errors import UserError
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.run.metrics import write_json
from tests.processes import environments

RESULTS = Path(__file__).parent / "results/cpu/kills.json"
SETTINGS = "checkpoint: {every: 1, keep: 3}\n"
LONGEST_S = 4.0
"""A random moment comes at most so long after the start: a few iterations after training has begun."""
WRITING_S = 0.01
"""And that in a save so long after its folder was made."""
END_S = 30
Processes = list[ForkServerProcess]


def train_as(environment: dict[str, str], folder: Path, arguments: list[str]) -> None:
    """What each process runs."""
    from dgpo_fast.config.command_line import run_command
    from dgpo_fast.train import train

    os.environ.update(environment)
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train", *arguments]
    status = run_command(train)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as the command ends


class Victim:
    """The run that is killed.

    Args:
        folder: the workspace.
        count: its processes.
        rng: chooses moments and processes.
    """

    def __init__(self, folder: Path, count: int, rng: random.Random):
        self.folder, self.count, self.rng = folder, count, rng
        self.home = folder / "runs/killed"
        self.checkpoints = self.home / "checkpoints"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["dgpo_fast.train", "dgpo_fast.trainer", "tests.distributed_runs"])

    def start(self, *arguments: str) -> Processes:
        """The processes of a run."""
        processes = [
            self.context.Process(target=train_as, args=(environment, self.folder, list(arguments)))
            for environment in environments(self.count)
        ]
        for process in processes:
            process.start()
        return processes

    def start_or_resume(self, iterations: int) -> Processes:
        """Goes on; begins again if nothing was saved yet."""
        if any(self.checkpoints.glob("iteration-*")):
            return self.start("--resume", "runs/killed", "--iterations", str(iterations))
        shutil.rmtree(self.home, ignore_errors=True)
        return self.start("small.yaml", "--name", "killed", "--iterations", str(iterations))

    def kill(self, iterations: int, *, saving: bool) -> dict[str, Any]:
        """Starts, kills, and looks at what is left."""
        began, had = time.monotonic(), self.newest()
        processes = self.start_or_resume(iterations)
        if saving:
            rank = 0
            self._wait_for_a_save(processes, had)
            time.sleep(self.rng.uniform(0, WRITING_S))
        else:
            rank = self.rng.randrange(self.count)
            time.sleep(self.rng.uniform(0, LONGEST_S))
        processes[rank].kill()
        after_s = time.monotonic() - began
        statuses = end(processes)
        return {"process": rank, "saving": saving, "after_s": after_s, "statuses": statuses, **self.left(had)}

    def _wait_for_a_save(self, processes: Processes, had: int) -> None:
        """Until the folder of a checkpoint is being filled that is newer than the one that the run goes on from."""
        while all(process.is_alive() for process in processes):
            staged = [path.name for path in self.checkpoints.glob(".iteration-??????")]
            if any(int(name[-6:]) > had + 1 for name in staged):
                return
            time.sleep(0.001)

    def left(self, had: int) -> dict[str, Any]:
        """What a kill left on the disk, if there was the checkpoint `had` before, -1 for none."""
        half_written = len(list(self.checkpoints.glob(".iteration-*")))
        names = [path.name for path in self.checkpoints.glob("iteration-*")]
        try:
            state, passed_over = load_newest(self.checkpoints)
        except UserError as error:
            broken = [str(error)] if names or had >= 0 else []
            return {"half_written": half_written, "resumes_after": -1, "broken": broken}
        return {"half_written": half_written, "resumes_after": state.iteration, "broken": passed_over}

    def newest(self) -> int:
        """Iteration of the newest checkpoint, -1 without one."""
        return max((int(path.name[-6:]) for path in self.checkpoints.glob("iteration-*")), default=-1)


def end(processes: Processes, seconds: float = END_S) -> list[int | None]:
    """Exit statuses; what is left after `seconds` is killed, as torchrun does."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def kill_and_compare(folder: Path, count: int, processes: int, seed: int) -> dict[str, Any]:
    """The report of `count` kills."""
    if not folder.exists():
        workspace(folder, SETTINGS)
    log = folder / "kills.jsonl"
    kills = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    victim = Victim(folder, processes, random.Random(f"{seed} {len(kills)}"))
    for number in range(len(kills), count):
        kills.append(victim.kill(100 * count, saving=number % 2 == 1))
        with log.open("a") as file:
            file.write(json.dumps(kills[-1]) + "\n")
        print(f"kill {number + 1}/{count}: {json.dumps(kills[-1])}", flush=True)
    # However far the kills let it come, both runs end at the same iteration.
    last = kills[-1]["resumes_after"] + 2
    statuses = end(victim.start_or_resume(last), 3600)
    shutil.rmtree(folder / "runs/undisturbed", ignore_errors=True)  # of an earlier comparison
    statuses += end(victim.start("small.yaml", "--name", "undisturbed", "--iterations", str(last)), 3600)
    if any(statuses):
        print((folder / "log.txt").read_text()[-2000:], file=sys.stderr)
    return {
        "processes": processes,
        "seed": seed,
        "iterations": last,
        "kills_while_saving": sum(kill["saving"] and kill["half_written"] > 0 for kill in kills),
        "kills_with_a_broken_checkpoint": sum(bool(kill["broken"]) for kill in kills),
        "final_statuses": statuses,
        "metrics_equal_undisturbed": comparable(victim.home) == comparable(folder / "runs/undisturbed"),
        "kills": kills,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as scratch:
        report = kill_and_compare(Path(scratch) / "workspace", args.kills, args.processes, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, report)
    if args.out == RESULTS:
        replace_part("kills", text(report))
    print(text(report))
    if not as_documented(report):
        raise SystemExit(1)


def written() -> dict[str, Any]:
    """The report in the file."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def as_documented(report: dict[str, Any]) -> bool:
    """Whether the kills changed nothing."""
    broken = report["kills_with_a_broken_checkpoint"]
    return report["metrics_equal_undisturbed"] and not broken and not any(report["final_statuses"])


def text(report: dict[str, Any]) -> str:
    """One sentence."""
    equal = "equal those" if report["metrics_equal_undisturbed"] else "DIFFER from those"
    return (
        f"{len(report['kills'])} kills of one of {report['processes']} processes, {report['kills_while_saving']} of "
        f"them with a checkpoint half written: {report['kills_with_a_broken_checkpoint']} left a broken checkpoint "
        f"under a checkpoint's name, and the metrics of all {report['iterations']} iterations {equal} of a run that "
        "was not killed."
    )


if __name__ == "__main__":
    main()
