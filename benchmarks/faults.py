"""Makes the faults that a run meets, one after another, and writes down what happened and what was lost.

    python benchmarks/faults.py

Each fault hits a run of two CPU processes joined by gloo, which is then resumed where it ended. Writes
`benchmarks/results/cpu/faults.json` and the table in `docs/scaling.md`. The disk's faults mount a small tmpfs, which
needs root.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from dgpo_fast.metrics import read_metrics, write_json
from tests.distributed_runs import Brightness, make_workspace
from tests.pipelines import save_random_pipeline
from tests.processes import environments

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu/faults.json"
PAGE, MARKS = ROOT / "docs/scaling.md", ("<!-- faults: made by benchmarks/faults.py -->", "<!-- end of faults -->")
ITERATIONS, COUNT = 6, 2


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


def train_with_nan_gradient(arguments: list[str]) -> int:
    """A run whose process 1 has a NaN in its gradient of iteration 3."""
    from dgpo_fast.cli import run_command
    from dgpo_fast.objectives.dgpo import DGPOObjective
    from dgpo_fast.train import train

    accumulate = DGPOObjective.accumulate

    def broken(self: Any, batch: Any, models: Any, old: Any) -> Any:
        losses = accumulate(self, batch, models, old)
        if os.environ["RANK"] == "1" and batch.iteration == 2:
            next(iter(models.weights.values())).grad[0, 0] = math.nan
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
        line: what the first process that ended with an error said, or the run's note of it.
        reached: iterations in metrics.jsonl at the end of the disturbed run.
        resumed_after: iteration that the run went on from; None where it was not resumed.
        resumed_statuses: exit statuses of the resumed run.
        final: iterations in metrics.jsonl at the very end.
        groups_dropped, steps_skipped: in the whole run.
    """

    fault: str
    statuses: list[int]
    line: str
    reached: int
    resumed_after: int | None
    resumed_statuses: list[int]
    final: int
    groups_dropped: int
    steps_skipped: int

    @property
    def happened(self) -> str:
        """For the table."""
        if self.resumed_statuses:
            return (
                "resumed from its newest checkpoint and finished" if not any(self.resumed_statuses) else "NOT RESUMED"
            )
        return "the run went on to its end" if not any(self.statuses) else "nothing was begun"

    @property
    def lost(self) -> str:
        """For the table."""
        parts = []
        if self.resumed_after is not None and self.reached > self.resumed_after:
            parts.append(f"{self.reached - self.resumed_after} iterations, made again")
        if self.groups_dropped:
            parts.append(f"{self.groups_dropped} group(s)")
        if self.steps_skipped:
            parts.append(f"{self.steps_skipped} step(s)")
        return ", ".join(parts) or "nothing"


class Run:
    """One run of `COUNT` processes in a folder of its own name.

    Args:
        folder: the workspace.
        name: of the run.
        extra: settings.
        program: what to start instead of the trainer.
    """

    def __init__(self, folder: Path, name: str, extra: list[str], program: list[str] | None = None):
        self.folder, self.name, self.extra = folder, name, extra
        self.program = program or ["-m", "dgpo_fast.train"]
        self.runs = Path(extra[extra.index("--runs-dir") + 1] if "--runs-dir" in extra else "runs")
        self.processes: list[subprocess.Popen] = []

    @property
    def home(self) -> Path:
        return self.folder / self.runs / self.name

    def start(self, arguments: list[str] | None = None, program: list[str] | None = None) -> None:
        arguments = arguments or ["small.yaml", "--name", self.name, "--iterations", str(ITERATIONS), *self.extra]
        command = [sys.executable, *(program or self.program), *arguments]
        self.logs = [self.folder / f"{self.name}-{rank}.log" for rank in range(COUNT)]
        self.processes = [
            subprocess.Popen(command, cwd=self.folder, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)
            for env, log in zip(environments(COUNT), self.logs, strict=True)
        ]

    def wait_for(self, iteration: int) -> None:
        """Until the metrics of `iteration` are written, or the run has ended."""
        while self.reached() < iteration and all(process.poll() is None for process in self.processes):
            time.sleep(0.05)

    def end(self, seconds: float = 120) -> list[int]:
        """Exit statuses; what has not ended is killed: after the first one that failed it gets ten seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            if any(process.poll() for process in self.processes):
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.1)
        for process in self.processes:
            process.kill()
            process.wait()
        return [process.returncode for process in self.processes]

    def reached(self) -> int:
        """Iterations in the metrics."""
        path = self.home / "metrics.jsonl"
        return len(read_metrics(path)) if path.is_file() else 0

    def said(self, pattern: str = r"^error: (.*)") -> str:
        """The first line of a log that fits `pattern`, without this machine's folders."""
        for log in self.logs:
            found = re.search(pattern, log.read_text(), re.MULTILINE)
            if found:
                return found[1].replace(f"{self.folder}/", "").strip()
        return ""

    def resume(self) -> tuple[int | None, list[int], str]:
        """Goes on; the iteration it went on from, exit statuses, and what it passed over."""
        self.start(["--resume", str(self.runs / self.name)], ["-m", "dgpo_fast.train"])
        statuses = self.end()
        after = self.said(r"resuming after iteration (\d+)")
        return (int(after) if after else None), statuses, self.said(r"^(passed over .*)")

    def outcome(self, fault: str, line: str | None = None, resume: bool = True) -> Outcome:
        """Waits for the end, resumes, and says what happened; `line` is what the run should have said in its log."""
        statuses = self.end()
        said, reached = self.said(line) if line else self.said(), self.reached()
        after, resumed, passed_over = self.resume() if resume else (None, [], "")
        lines = read_metrics(self.home / "metrics.jsonl") if (self.home / "metrics.jsonl").is_file() else []
        return Outcome(
            fault, statuses, passed_over or said, reached, after, resumed, self.reached(),
            sum(line["groups_dropped_count"] for line in lines),
            sum(line.get("steps_skipped_count", 0) for line in lines),
        )  # fmt: skip


def nan_reward(folder: Path) -> Outcome:
    run = Run(folder, "nan-reward", ["--rewards", "benchmarks.faults:NaNReward"])
    run.start()
    return run.outcome("a reward is NaN", r"(group dropped: .*)", resume=False)


def nan_gradient(folder: Path) -> Outcome:
    run = Run(folder, "nan-gradient", [], [str(Path(__file__)), "--nan-gradient"])
    run.start()
    return run.outcome("a NaN in one process's gradient", r"(the gradient is not finite.*)", resume=False)


def hung_reward(folder: Path) -> Outcome:
    (folder / "hang").touch()
    run = Run(folder, "hung", ["--rewards", "benchmarks.faults:HungReward", "--reward-deadline-s", "5"])
    run.start()
    run.end()
    (folder / "hang").unlink()
    return run.outcome("a reward hangs")


def paused(folder: Path) -> Outcome:
    run = Run(folder, "paused", ["--distributed.timeout-s", "15"])
    run.start()
    run.wait_for(3)
    run.processes[1].send_signal(signal.SIGSTOP)
    return run.outcome("a process stops (SIGSTOP) for longer than `distributed.timeout_s`")


def full_disk(folder: Path) -> Outcome:
    with small_disk(folder / "disk", "size=4m"):
        run = Run(folder, "full", ["--runs-dir", "disk"])
        run.start()
        run.wait_for(3)
        fill = folder / "disk/fill"
        try:
            with fill.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
        except OSError:
            pass  # full, as it should be
        run.end()
        fill.unlink()
        return run.outcome("the disk is full")


def read_only(folder: Path) -> Outcome:
    with small_disk(folder / "sealed", "size=1m,ro"):
        run = Run(folder, "read-only", ["--runs-dir", "sealed"])
        run.start()
        return run.outcome("the folder cannot be written", resume=False)


def damaged(folder: Path, name: str, fault: str, damage: Callable[[bytes], bytes]) -> Outcome:
    run = Run(folder, name, [])
    run.start()
    run.wait_for(5)
    for process in run.processes:
        process.kill()
    run.end()
    newest = max((run.home / "checkpoints").glob("iteration-*")) / "state.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    return run.outcome(fault)


def truncated(folder: Path) -> Outcome:
    return damaged(folder, "truncated", "both processes are killed, and the newest checkpoint is cut in half",
                   lambda content: content[: len(content) // 2])  # fmt: skip


def bit_flipped(folder: Path) -> Outcome:
    return damaged(folder, "flipped", "both processes are killed, and a bit of the newest checkpoint is flipped",
                   lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])  # fmt: skip


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FAULTS = (nan_reward, nan_gradient, full_disk, read_only, truncated, bit_flipped, hung_reward, paused)


def table(outcomes: list[Outcome]) -> str:
    """In Markdown."""
    rows = ["| fault | exit | what was said | what happened | lost |", "| --- | --- | --- | --- | --- |"]
    for o in outcomes:
        statuses = ", ".join(map(str, o.statuses))
        rows.append(f"| {o.fault} | {statuses} | {o.line.replace('|', '/')} | {o.happened} | {o.lost} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS], nargs="*")
    args = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pipeline").mkdir()
        save_random_pipeline(folder / "pipeline")
        make_workspace(folder, folder / "pipeline")
        with (folder / "small.yaml").open("a") as file:
            file.write("checkpoint: {every: 2, keep: 3}\n")
        for fault in FAULTS:
            if not args.only or fault.__name__ in args.only:
                outcomes.append(fault(folder))
                print(json.dumps(asdict(outcomes[-1])), flush=True)
    if not args.only:
        write_json(RESULTS, {"processes": COUNT, "iterations": ITERATIONS, "faults": [asdict(o) for o in outcomes]})
        before, after = (
            part.split(mark)[i] for part, mark, i in zip([PAGE.read_text()] * 2, MARKS, (0, 1), strict=True)
        )
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{table(outcomes)}\n\n{MARKS[1]}{after}")
    print(table(outcomes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--nan-gradient"]:
        raise SystemExit(train_with_nan_gradient(sys.argv[2:]))
    main()
