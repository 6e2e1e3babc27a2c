"""What runs in a worker process: it loads rewards by name and scores one group after another.

`process.py` starts it. Requests and answers go over a socket, images through memory that both processes map.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.protocol import Reward
from dgpo_fast.rewards.registry import load_reward
from dgpo_fast.rewards.weighted import score_group

PR_SET_PDEATHSIG = 1


def serve(socket: int, memory: int, parent: int) -> None:
    """Answers requests until the trainer, the process `parent`, is gone.

    A request is (name of the reward, its source, shape of the images, prompt). It is answered by the line that says why
    the reward cannot be loaded here, or by None and then by (answer, UserError's text or None, seconds).

    Args:
        socket: file descriptor of the connection.
        memory: file descriptor of the memory that holds the images of a request, uint8.
        parent: process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    _die_with(parent)
    connection, rewards = Connection(socket), dict[str, Reward]()
    pixels = np.empty(0, np.uint8)
    try:
        while True:
            name, source, shape, prompt = connection.recv()
            problem = _load(name, source, rewards)
            connection.send(problem)
            if problem:
                continue
            size = int(np.prod(shape))
            if len(pixels) < size:
                pixels = np.frombuffer(mmap.mmap(memory, os.fstat(memory).st_size), np.uint8)
            started = time.perf_counter()
            try:
                answer, error = score_group(name, rewards[name], pixels[:size].reshape(shape), prompt), None
            except UserError as caught:
                answer, error = "", str(caught)
            connection.send((answer, error, time.perf_counter() - started))
    except (EOFError, ConnectionError):
        return


def _load(name: str, source: str, rewards: dict[str, Reward]) -> str | None:
    """Loads a reward that is not yet in `rewards`; returns why it cannot be loaded."""
    if name not in rewards:
        try:
            rewards[name] = load_reward(name, source)
        except UserError as error:
            return str(error)
    return None


def _die_with(parent: int) -> None:
    """Has Linux kill this process when the trainer dies, even in the middle of a call that never returns.

    Elsewhere, the process ends when it next reads a request.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit()
