"""Which of several functions is the fastest here."""

import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 5
GPU_REPEATS = 5


def best_ms(functions: Sequence[Callable[[], object]], device: torch.device, budget_s: float) -> list[float]:
    """Milliseconds of one call of each of `functions`: the best of rounds that alternate between them.

    What else the machine does slows a call by chance and never speeds one up. On a CPU the calling thread's own time
    is taken, which leaves out the time that other programs had the core.

    Args:
        functions: called again and again; the first calls are not counted.
        device: waited for, if it is a GPU.
        budget_s: seconds for all of it; at least five rounds are made.
    """
    measure = _gpu_seconds if device.type == "cuda" else _cpu_seconds
    for function in functions:
        function()
    best = [float("inf")] * len(functions)
    started, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - started < budget_s:
        best = [min(known, measure(function)) for known, function in zip(best, functions, strict=True)]
        rounds += 1
    return [seconds * 1e3 for seconds in best]


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
