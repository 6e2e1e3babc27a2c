"""Several real processes on this machine, joined by gloo: what the tests of distributed runs share."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def heed_ctrl_c() -> None:
    """For a new process: tests that a shell runs in its background inherit a SIGINT that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


def start(arguments: list[str], count: int, machines: int = 1) -> list[subprocess.Popen]:
    """`python ARGUMENTS` as `count` processes of one group, as if on so many machines."""
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for env in environments(count, machines)
    ]


def finish(processes: list[subprocess.Popen], timeout_s: float = 400) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of each; kills what is left after `timeout_s`."""
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


def run_together(arguments: list[str], count: int, machines: int = 1) -> list[str]:
    """The output of each of `count` processes, all of which must succeed."""
    results = finish(start(arguments, count, machines))
    for status, _, errors in results:
        assert status == 0, errors
    return [output for _, output, _ in results]
