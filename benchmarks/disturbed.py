"""Runs of several CPU processes, joined by gloo, that something happens to: what the benchmarks of faults share."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dgpo_fast.run.metrics import read_metrics
from tests.distributed_runs import make_workspace
from tests.pipelines import save_random_pipeline
from tests.processes import environments

TRAIN = ["-m", "dgpo_fast.train"]
CLOCK = ("_s", "_mib", "tflops", "mfu")
ENGINE = "engine: {compile: 'off', attention: native, linear: torch}\n"
"""What costs nothing to start: these runs are short, and start often."""
END_S = 15
"""Seconds that a process has to end after another one has, before it is killed, as torchrun does."""


def workspace(folder: Path, extra: str) -> Path:
    """Makes a small random pipeline, prompts and `small.yaml` in `folder`; `extra` are more lines of settings."""
    (folder / "pipeline").mkdir(parents=True)
    save_random_pipeline(folder / "pipeline")
    make_workspace(folder, folder / "pipeline")
    path = folder / "small.yaml"
    settings = yaml.safe_load(path.read_text())
    for name, value in yaml.safe_load(ENGINE + extra).items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(settings))
    return folder


def comparable(run: Path) -> list[dict]:
    """The metrics of `run` that do not depend on the clock."""
    return [
        {name: value for name, value in line.items() if _is_result(name, value)}
        for line in read_metrics(run / "metrics.jsonl")
    ]


def without_names(line: str) -> str:
    """A line of a log without what differs from one time to the next: this machine's name and numbers."""
    line = re.sub(r"process \d{3,}", "process NUMBER", line)
    return re.sub(r"(\d\]):\d+", r"\1:PORT", line.replace(socket.gethostname(), "HOST")).strip()


def _is_result(name: str, value: object) -> bool:
    # A reward's own name is a setting: what it gives is in `reward_mean`.
    return (
        not name.startswith("reward/")
        and not name.endswith(CLOCK)
        and not isinstance(value, list)
        and name != "imbalance"
    )


@dataclass
class Resumed:
    """How a run went on.

    Attributes:
        after: the iteration that it went on from.
        statuses: exit statuses of its processes.
        passed_over: what it says of checkpoints that it did not take.
    """

    after: int | None
    statuses: list[int]
    passed_over: str


class Run:
    """One run in a folder of its own name.

    Args:
        folder: the workspace.
        name: of the run.
        settings: more of the command line.
        program: what to start instead of the trainer.
        count: its processes.
        label: of its logs, instead of the name.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Iterable[str] = (),
        program: list[str] | None = None,
        *,
        count: int = 2,
        label: str = "",
    ):
        self.folder, self.name, self.settings, self.program, self.count = folder, name, list(settings), program, count
        self.label = label or name
        runs = self.settings[self.settings.index("--runs-dir") + 1] if "--runs-dir" in self.settings else "runs"
        self.address = f"{runs}/{name}"
        self.processes: list[subprocess.Popen] = []
        self.logs: list[Path] = []

    @property
    def home(self) -> Path:
        """The run's folder."""
        return self.folder / self.address

    def start(self) -> None:
        """Begins the run."""
        self._start([*(self.program or TRAIN), "small.yaml", "--name", self.name, *self.settings])

    def resume(self, *settings: str) -> Resumed:
        """Goes on, to the end."""
        self.start_again(*settings)
        statuses = self.end()
        after = self.said(r"resuming after iteration (\d+)")
        return Resumed(int(after) if after else None, statuses, self.said(r"^(passed over .*)"))

    def start_again(self, *settings: str) -> None:
        """Goes on from the newest checkpoint."""
        self._start([*TRAIN, "--resume", self.address, *settings])

    def _start(self, arguments: list[str]) -> None:
        self.logs = [self.folder / f"{self.label}-{rank}.log" for rank in range(self.count)]
        self.processes = []
        for env, log in zip(environments(self.count), self.logs, strict=True):
            with log.open("w") as file:
                command = [sys.executable, *arguments]
                self.processes.append(
                    subprocess.Popen(command, cwd=self.folder, env=env, stdout=file, stderr=subprocess.STDOUT)
                )

    @property
    def alive(self) -> bool:
        """Whether no process has ended."""
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, iteration: int) -> None:
        """Until the metrics of `iteration` are written, or a process has ended."""
        while self.reached() < iteration and self.alive:
            time.sleep(0.05)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one process."""
        self.processes[rank].send_signal(number)

    def end(self, seconds: float = 300) -> list[int]:
        """Waits for the end; exit statuses. Kills what does not end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            if not self.alive:
                deadline = min(deadline, time.monotonic() + END_S)
            time.sleep(0.05)
        for process in self.processes:
            process.kill()
            process.wait()
        return [process.returncode for process in self.processes]

    def reached(self) -> int:
        """Iterations in the metrics."""
        path = self.home / "metrics.jsonl"
        return len(read_metrics(path)) if path.is_file() else 0

    def said(self, pattern: str) -> str:
        """The first line of a log that fits `pattern`, without the names of this machine."""
        for log in self.logs:
            found = re.search(pattern, log.read_text(), re.MULTILINE)
            if found:
                return without_names(found[1].replace(f"{self.folder}/", ""))
        return ""
