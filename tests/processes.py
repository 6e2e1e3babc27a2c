"""Processes that tests start, alone or as several that are joined by gloo.

Importing torch, diffusers and this package takes seconds, so they are forked from a server that has done it.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
ROOT = Path(__file__).parents[1]


def heed_ctrl_c() -> None:
    """For a new process: tests that a shell runs in its background inherit a SIGINT that is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environments(count: int, machines: int = 1) -> list[dict[str, str]]:
    """What torchrun would put into the environment of each of `count` processes, as if on so many machines."""
    local = count // machines
    shared = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in range(count)]


class PythonProcess:
    """`python ARGUMENTS` in this working folder; its output is kept in files.

    Args:
        arguments: `-m MODULE …`, `-c CODE …` or `SCRIPT …`.
        environment: all of it; None: this process's.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str] | None = None):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("output", "errors")]
        self.process = CONTEXT.Process(
            target=_run, args=(list(arguments), dict(environment or os.environ), os.getcwd(), self.files)
        )
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """Exit status, −N after signal N; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and waits for its end."""
        self.process.kill()
        self.process.join()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it wrote to stdout and stderr until its end, which must come within `timeout` seconds."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        output, errors = (file.read_text(encoding="utf-8") for file in self.files)
        return output, errors


def _run(arguments: list[str], environment: dict[str, str], folder: str, files: list[Path]) -> None:
    for number, file in enumerate(files, start=1):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    heed_ctrl_c()
    kind, *rest = arguments
    sys.path.insert(0, folder if kind.startswith("-") else str(Path(kind).parent))
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = [kind, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def start(arguments: list[str], count: int, machines: int = 1) -> list[PythonProcess]:
    """`python ARGUMENTS` as `count` processes of one group, each as if on its own machine."""
    return [PythonProcess(arguments, environment) for environment in environments(count, machines)]


def finish(processes: list[PythonProcess], timeout_s: float = 400) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of each; kills what is left after `timeout_s`."""
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode or 0, *texts) for process, texts in zip(processes, outputs, strict=True)]


def run_together(arguments: list[str], count: int, machines: int = 1) -> list[str]:
    """The output of each of `count` processes, all of which must succeed."""
    results = finish(start(arguments, count, machines))
    for status, _, errors in results:
        assert status == 0, errors
    return [output for _, output, _ in results]


def run_alone(arguments: list[str]) -> str:
    """The output of one process, which must succeed."""
    [(status, output, errors)] = finish([PythonProcess(arguments)])
    assert status == 0, output + errors
    return output
