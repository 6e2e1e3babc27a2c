"""Which of several functions is the fastest here."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

ROUNDS = 5
GPU_REPEATS = 5


class Spread:
    """How far the rounds of all timings lay apart since it was made.

    Attributes:
        largest: the largest of medians over bests; about 1 on a machine that does nothing else.
    """

    def __init__(self) -> None:
        self.largest = 1.0

    def add(self, rounds: Sequence[float]) -> None:
        """Rounds of one function."""
        self.largest = max(self.largest, median(rounds) / max(min(rounds), 1e-9))


def best_ms(
    functions: Sequence[Callable[[], object]], device: torch.device, budget_s: float, spread: Spread | None = None
) -> list[float]:
    """Milliseconds of one call of each of `functions`: the best of rounds that alternate between them.

    What else the machine does slows a call by chance and never speeds one up. On a CPU the calling thread's own time
    is taken, which leaves out the time that other programs had the core.

    Args:
        functions: called again and again; the first calls are not counted.
        device: waited for, if it is a GPU.
        budget_s: seconds for all of it; at least five rounds are made.
        spread: is told of the rounds.
    """
    measure = _gpu_seconds if device.type == "cuda" else _cpu_seconds
    for function in functions:
        function()
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < ROUNDS or time.perf_counter() - started < budget_s:
        rounds.append([measure(function) for function in functions])
    of_each = list(zip(*rounds, strict=True))
    for seconds in of_each:
        if spread is not None:
            spread.add(seconds)
    return [min(seconds) * 1e3 for seconds in of_each]


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def _gpu_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(GPU_REPEATS):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / GPU_REPEATS
