"""Makes the faults that a run meets, one after another, and writes down what happened and what was lost.

    python -m benchmarks.faults [--only paused_too_long …] [--table]

Each fault hits a run of two CPU processes joined by gloo, which is then resumed where it ended, and its metrics are
compared with those of a run that nothing happened to. Writes `benchmarks/results/cpu/faults.json` and the table in
`docs/scaling.md`; `--only` renews some rows of both, `--table` only the table. The disk's faults mount a small
tmpfs, which needs root.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.disturbed import TRAIN, Run, comparable, workspace
from benchmarks.pages import replace_part
from dgpo_fast.run.metrics import read_metrics, write_json
from tests.distributed_runs import Brightness

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu/faults.json"
ITERATIONS, CHECKPOINT_EVERY = 6, 2
SETTINGS = f"checkpoint: {{every: {CHECKPOINT_EVERY}, keep: 3}}\n"
ERROR = r"^error: (.*)"
PAUSE_S = 60


class NaNReward(Brightness):
    """Gives one prompt's images a NaN."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        rewards = super().__call__(images, prompts, metadata)
        return np.full_like(rewards, math.nan) if prompts[0] == "a dog" else rewards


class HungReward(Brightness):
    """Never answers for one prompt in training, as long as the file `hang` is there."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        while len(images) > 1 and prompts[0] == "a dog" and Path("hang").exists():
            time.sleep(0.1)
        return super().__call__(images, prompts, metadata)


class HungWorker(HungReward):
    """The same in a worker process."""

    runs_on_cpu = True


def train_and_break(what: str, arguments: list[str]) -> int:
    """A run in whose third iteration process 1 has a NaN in its gradient, or a flipped bit in a weight."""
    import torch

    from dgpo_fast.config.command_line import run_command
    from dgpo_fast.objectives.dgpo import DGPOObjective
    from dgpo_fast.train import train

    accumulate = DGPOObjective.accumulate

    def broken(self: Any, batch: Any, models: Any, old: Any) -> Any:
        losses = accumulate(self, batch, models, old)
        if os.environ["RANK"] == "1" and batch.iteration == 2:
            weight = next(iter(models.weights.values()))
            if what == "gradient":
                weight.grad[0, 0] = math.nan
            else:
                weight.data.view(torch.int32)[0, 0] ^= 1
        return losses

    DGPOObjective.accumulate = broken  # type: ignore[method-assign]
    sys.argv = ["train", *arguments]
    return run_command(train)


@dataclass
class Outcome:
    """What a fault did.

    Attributes:
        fault: what was done to the run.
        statuses: exit statuses of the processes.
        said: what the run said of it.
        reached: iterations in metrics.jsonl at the end of the disturbed run.
        resumed_after: iteration that the run went on from; None if it was not resumed.
        resumed_statuses: exit statuses of the resumed run.
        passed_over: what the resumed run said of checkpoints that it did not take.
        final: iterations in metrics.jsonl at the very end.
        groups_dropped, steps_skipped: in the whole run.
        equal: whether the metrics are at last those of a run that nothing happened to.
    """

    fault: str
    statuses: list[int]
    said: str
    reached: int
    resumed_after: int | None
    resumed_statuses: list[int]
    passed_over: str
    final: int
    groups_dropped: int
    steps_skipped: int
    equal: bool

    @property
    def happened(self) -> str:
        """For the table."""
        said = f": `{self.said.replace('|', '/')}`" if self.said else ""
        if not any(self.statuses):
            return f"the run goes on to its end{said}"
        statuses = " and ".join(map(str, dict.fromkeys(self.statuses)))
        text = f"the processes end with status {statuses}{said}"
        if self.resumed_after is None:
            return text
        passed_over = f" (`{self.passed_over}`)" if self.passed_over else ""
        return f"{text}; resumed after iteration {self.resumed_after}{passed_over}"

    @property
    def lost(self) -> str:
        """For the table."""
        again = 0 if self.resumed_after is None else self.reached - self.resumed_after
        parts = [
            _count(again, "iteration") + ", made again" if again > 0 else "",
            _count(self.groups_dropped, "group") if self.groups_dropped else "",
            _count(self.steps_skipped, "step") if self.steps_skipped else "",
        ]
        if any(parts):
            return "; ".join(filter(None, parts))
        return "nothing" if self.equal or (self.reached == 0 and self.resumed_after is None) else "the run"

    @property
    def as_documented(self) -> bool:
        """Whether it went on to the end of an undisturbed run, or said in one line why it cannot."""
        went_on = not any(self.resumed_statuses) if self.resumed_after is not None else not any(self.statuses)
        if went_on and self.final == ITERATIONS:
            return self.equal or self.groups_dropped + self.steps_skipped > 0
        return bool(self.said) and self.resumed_after is None and "Traceback" not in self.said


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def outcome(fault: str, run: Run, said: str = ERROR, resume: bool = True) -> Outcome:
    """Waits for the end of `run`, resumes it, and says what happened. `said` is what its log should have."""
    statuses = run.end()
    line, reached = run.said(said), run.reached()
    resumed = run.resume() if resume else None
    metrics = run.home / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    return Outcome(
        fault,
        statuses,
        line,
        reached,
        resumed.after if resumed else None,
        resumed.statuses if resumed else [],
        resumed.passed_over if resumed else "",
        run.reached(),
        sum(line["groups_dropped_count"] for line in lines),
        sum(line["steps_skipped_count"] for line in lines),
        bool(lines) and comparable(run.home) == comparable(run.folder / "runs/undisturbed"),
    )


def started(folder: Path, name: str, *settings: str, program: list[str] | None = None, until: int = 0) -> Run:
    """A run that has come to iteration `until`."""
    run = Run(folder, name, ["--iterations", str(ITERATIONS), *settings], program)
    run.start()
    run.wait_for(until)
    return run


def nan_reward(folder: Path) -> Outcome:
    run = started(folder, "nan-reward", "--rewards", "benchmarks.faults:NaNReward")
    return outcome("a reward is NaN", run, r"(group dropped: .*)", resume=False)


def nan_gradient(folder: Path) -> Outcome:
    run = started(folder, "nan-gradient", program=["-m", "benchmarks.faults", "--break", "gradient"])
    return outcome("a NaN in one process's gradient", run, r"(the gradient is not finite.*)", resume=False)


def flipped_weight(folder: Path) -> Outcome:
    run = started(folder, "flipped-weight", program=["-m", "benchmarks.faults", "--break", "weight"])
    return outcome("a bit of one process's weights flips", run)


def hung_reward(folder: Path) -> Outcome:
    (folder / "hang").touch()
    run = started(folder, "hung", "--rewards", "benchmarks.faults:HungReward", "--reward-deadline-s", "5")
    run.end()
    (folder / "hang").unlink()
    return outcome("a reward hangs in a trainer's process", run)


def hung_worker(folder: Path) -> Outcome:
    (folder / "hang").touch()
    settings = ["--rewards", "benchmarks.faults:HungWorker", "--reward-deadline-s", "5", "--reward-workers", "1"]
    run = started(folder, "hung-worker", *settings)
    run.end()
    (folder / "hang").unlink()
    return outcome("a reward hangs in a worker", run, r"(group dropped: .*)", resume=False)


def paused(folder: Path) -> Outcome:
    run = started(folder, "paused", until=3)
    run.signal(1, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    run.signal(1, signal.SIGCONT)
    return outcome(f"a process is paused for {PAUSE_S} s (SIGSTOP, SIGCONT)", run, resume=False)


def paused_too_long(folder: Path) -> Outcome:
    run = started(folder, "paused-too-long", "--distributed.timeout-s", "15", until=3)
    run.signal(1, signal.SIGSTOP)
    return outcome("a process is paused for longer than `distributed.timeout_s`, here 15", run)


def killed(folder: Path) -> Outcome:
    run = started(folder, "killed", until=5)
    run.signal(1, signal.SIGKILL)
    return outcome("a process is killed (SIGKILL)", run)


def killed_under_torchrun(folder: Path) -> Outcome:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", *TRAIN]
    run = Run(folder, "torchrun", ["--iterations", str(ITERATIONS)], torchrun, count=1)
    run.start()
    run.wait_for(5)
    workers = psutil.Process(run.processes[0].pid).children(recursive=True)
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    what = "a process is killed under `torchrun --max-restarts 1`"
    return outcome(what, run, r"(resuming after iteration \d+)", resume=False)


def terminated(folder: Path) -> Outcome:
    run = started(folder, "terminated", until=3)
    run.signal(1, signal.SIGTERM)
    return outcome("a process is to end (SIGTERM)", run, r"(stopped after iteration .*?);")


def full_disk(folder: Path) -> Outcome:
    with small_disk(folder / "full", "size=4m"):
        run = started(folder, "full-disk", "--runs-dir", "full", until=3)
        fill(folder / "full/fill")
        run.end()
        (folder / "full/fill").unlink()
        return outcome("the disk is full", run)


def unwritable(folder: Path) -> Outcome:
    with small_disk(folder / "unwritable", "size=1m,ro"):
        run = started(folder, "unwritable", "--runs-dir", "unwritable")
        return outcome("the folder of the runs cannot be written", run, resume=False)


def vanished(folder: Path) -> Outcome:
    run = started(folder, "vanished", until=3)
    reached = run.reached()
    shutil.rmtree(run.home)
    return replace(outcome("the run's folder is removed", run, resume=False), reached=reached)


def resumed_twice(folder: Path) -> Outcome:
    run = started(folder, "resumed-twice", until=3)
    for rank in range(run.count):
        run.signal(rank, signal.SIGSTOP)  # so that it does not end before the other one comes
    second = Run(folder, "resumed-twice", label="second")
    second.start_again()
    second.end()
    for rank in range(run.count):
        run.signal(rank, signal.SIGCONT)
    found = outcome("the run is resumed while it runs", run, resume=False)
    return replace(found, said=second.said(ERROR))


def damaged(folder: Path, name: str, fault: str, damage: Callable[[bytes], bytes]) -> Outcome:
    run = started(folder, name, until=5)
    for rank in range(run.count):
        run.signal(rank, signal.SIGKILL)
    run.end()
    newest = max((run.home / "checkpoints").glob("iteration-*")) / "state.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    return outcome(fault, run)


def truncated(folder: Path) -> Outcome:
    return damaged(
        folder,
        "truncated",
        "all processes are killed, and the newest checkpoint is cut in half",
        lambda content: content[: len(content) // 2],
    )


def bit_flipped(folder: Path) -> Outcome:
    return damaged(
        folder,
        "flipped",
        "all processes are killed, and a bit of the newest checkpoint flips",
        lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    )


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs at `folder`."""
    folder.mkdir()
    mount(folder, options)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    try:
        with path.open("wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass
    except OSError:
        return


FAULTS = (
    nan_reward,
    nan_gradient,
    flipped_weight,
    hung_reward,
    hung_worker,
    killed,
    killed_under_torchrun,
    terminated,
    paused,
    paused_too_long,
    full_disk,
    unwritable,
    vanished,
    truncated,
    bit_flipped,
    resumed_twice,
)


def text(outcomes: dict[str, Outcome]) -> str:
    """A table in Markdown."""
    rows = ["| fault | what happened | what was lost |", "| --- | --- | --- |"]
    return "\n".join([*rows, *(f"| {o.fault} | {o.happened} | {o.lost} |" for o in outcomes.values())])


def as_documented(outcomes: dict[str, Outcome]) -> bool:
    """Whether every fault ended well."""
    return all(one.as_documented for one in outcomes.values())


def written() -> dict[str, Outcome]:
    """The outcomes in the file, by the names of the faults."""
    return {name: Outcome(**one) for name, one in json.loads(RESULTS.read_text(encoding="utf-8"))["faults"].items()}


def run_all(names: list[str]) -> dict[str, Outcome]:
    """Makes the faults of these names, or all of them."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = workspace(Path(scratch), SETTINGS)
        undisturbed = started(folder, "undisturbed")
        if any(undisturbed.end()):
            raise SystemExit(undisturbed.logs[0].read_text())
        for fault in FAULTS:
            if not names or fault.__name__ in names:
                found = outcomes[fault.__name__] = fault(folder)
                print(json.dumps(asdict(found)), flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS], nargs="*", default=[])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    made = {} if args.table else run_all(args.only)
    found = {**(written() if args.table or args.only else {}), **made}
    outcomes = {fault.__name__: found[fault.__name__] for fault in FAULTS}
    if made:
        write_json(
            RESULTS,
            {
                "processes": 2,
                "iterations": ITERATIONS,
                "checkpoint_every": CHECKPOINT_EVERY,
                "faults": {name: asdict(one) for name, one in outcomes.items()},
            },
        )
    replace_part("faults", text(outcomes))
    print(text(outcomes))
    if not as_documented(outcomes):
        raise SystemExit(f"not as documented: {', '.join(n for n, one in outcomes.items() if not one.as_documented)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--break"]:
        status = train_and_break(sys.argv[2], sys.argv[3:])
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)  # as the command ends
    main()
