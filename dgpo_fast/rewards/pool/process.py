"""The trainer's side of one worker process: started when first needed, stopped when it hangs, started again."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt
from dgpo_fast.rewards.weighted import Answer

LOAD_DEADLINE_S = 900.0
"""Loading may take long if a reward reads a large model."""

# One thread each: the parallelism is in the number of processes. No GPU: these rewards run on the CPU, and a CUDA
# context in each of them would cost the trainer's memory.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# A fresh interpreter, not a fork: a fork of a process that uses CUDA or threads is broken. Not multiprocessing's spawn
# either, which runs the user's main module again.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from dgpo_fast.rewards.pool.worker import serve; serve{arguments}"


class CannotLoad(Exception):
    """A reward cannot be loaded in a worker process; the text says why."""


class WorkerProcess:
    """One worker process, used by one thread, which waits while a group is scored.

    Args:
        deadline_s: seconds within which a reward must have scored a group.
    """

    def __init__(self, deadline_s: float):
        self.deadline_s = deadline_s
        self.process: subprocess.Popen | None = None
        self.memory: int | None = None
        self.pixels = np.empty(0, np.uint8)

    def score(self, name: str, source: str, images: np.ndarray, prompt: Prompt) -> tuple[Answer, float]:
        """The answer of the reward `name`, loaded from `source`, for one prompt's images, uint8 (G, H, W, 3), and the
        seconds that it took.

        A process that dies or exceeds the deadline costs this group; the next one gets a new process.

        Raises:
            CannotLoad: the reward cannot be loaded in another process.
            UserError: the reward's own.
        """
        try:
            self._share(images)
        except OSError as error:
            return f"no memory to hand its pictures on ({error.strerror})", 0.0
        try:
            problem = self._ask((name, source, images.shape, prompt))
        except (EOFError, OSError) as error:
            raise CannotLoad(self._end(error, LOAD_DEADLINE_S)) from None
        if problem:
            raise CannotLoad(problem)
        started = time.perf_counter()
        try:
            answer, error_text, seconds = self._receive(self.deadline_s)
        except (EOFError, OSError) as error:
            return self._end(error, self.deadline_s), time.perf_counter() - started
        if error_text is not None:
            raise UserError(error_text)
        return answer, seconds

    def kill(self) -> None:
        """Ends the process and its children at once; can be called from any thread."""
        process = self.process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the process and frees what it shared."""
        if self.process is not None:
            self.kill()
            self.process.wait()
            self.process = None
            self.connection.close()
        if self.memory is not None:
            os.close(self.memory)
            self.memory = None

    def _ask(self, request: tuple[str, str, tuple[int, ...], Prompt]) -> str | None:
        """Sends a request to the process, a new one if need be; returns why its reward cannot be loaded, or None."""
        if self.process is None:
            self._start()
        self.connection.send(request)
        return self._receive(LOAD_DEADLINE_S)

    def _end(self, error: Exception, limit_s: float) -> str:
        """Cleans up after a process that has not answered; returns a phrase that says what happened to it."""
        process, self.process = self.process, None
        if process is None:
            return f"its process could not be started ({error})"
        status = None
        if not isinstance(error, TimeoutError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=5)  # the connection breaks a moment before the process is gone
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.connection.close()
        if isinstance(error, TimeoutError):
            return f"no answer within {limit_s:g} s, so its process was stopped"
        if status is None:
            return "its process closed the connection"
        if status < 0:
            return f"its process was ended by a signal ({signal.strsignal(-status)})"
        return f"its process ended with exit status {status}"

    def _start(self) -> None:
        assert self.memory is not None
        ours, theirs = socket.socketpair()
        program = _PROGRAM.format(path=sys.path, arguments=(theirs.fileno(), self.memory, os.getpid()))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), self.memory),
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # a terminal's Ctrl-C is not for it
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def _receive(self, seconds: float) -> Any:  # the reward's process answers each question in its own form
        if not self.connection.poll(seconds):
            raise TimeoutError
        return self.connection.recv()

    def _share(self, images: np.ndarray) -> None:
        if self.memory is None:
            self.memory = _memory_file()
        if len(self.pixels) < images.nbytes:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.memory, 0, images.nbytes)  # no memory is an error here, not a crash later
            else:
                os.truncate(self.memory, images.nbytes)
            self.pixels = np.frombuffer(mmap.mmap(self.memory, images.nbytes), np.uint8)
        self.pixels[: images.nbytes] = images.reshape(-1)


def _memory_file() -> int:
    """File descriptor of memory without a name, which vanishes with the processes that map it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("dgpo_fast images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
