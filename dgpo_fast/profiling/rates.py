"""What the device can do, measured in the run itself: its matmul rate and its copy bandwidth."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

REPEATS = 9
SUSTAINED_S = 2.0


@dataclass(frozen=True)
class Rates:
    """What a few repeats reach, and what lasts.

    Attributes:
        matmul_tflops: a square matmul of random numbers in the run's dtype, by the faster of torch's libraries. On a
            GPU, over `SUSTAINED_S` of them back to back: its clocks fall when it gets warm or reaches its power limit.
        matmul_burst_tflops: the same at the median of a few, at the clocks of a GPU that has rested.
        matmul_size: its side.
        copy_gb_per_s: bytes read and written by a copy much larger than any cache.
        copy_mib: size of the copied tensor.
    """

    matmul_tflops: float
    matmul_burst_tflops: float
    matmul_size: int
    copy_gb_per_s: float
    copy_mib: int


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """All rates of `device`; takes a few seconds, and on a GPU about 3 GiB, less if less is free."""
    size, copy_mib = 1024, 128
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        size, copy_mib = (8192, 1024) if free > 6 << 30 else (4096, 256) if free > 2 << 30 else (2048, 64)
    sustained, burst = product_tflops(device, dtype, size, size, size)
    return Rates(sustained, burst, size, _copy_gb_per_s(device, copy_mib), copy_mib)


def product_tflops(
    device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int
) -> tuple[float, float]:
    """Of (rows, inner) by (inner, columns), sustained and in a burst; on a CPU the burst's for both."""
    left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    out = left.new_empty(rows, columns)
    ways: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=out)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # On some processors several times as fast as the library behind torch.mm.
        weight = right.t().contiguous()
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], ""))
    tflop = 2 * rows * inner * columns / 1e12
    burst = tflop / min(_seconds(way, device) for way in ways)
    return tflop / _sustained_s(ways[0]) if device.type == "cuda" else burst, burst


def _sustained_s(action: Callable[[], object]) -> float:
    """Mean time of one of the calls that fill `SUSTAINED_S`."""
    started, calls, elapsed_s = time.perf_counter(), 0, 0.0
    while elapsed_s < SUSTAINED_S:
        for _ in range(REPEATS):
            action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        calls, elapsed_s = calls + REPEATS, time.perf_counter() - started
    return elapsed_s / calls


def _copy_gb_per_s(device: torch.device, mib: int) -> float:
    source = torch.randn(mib << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device) / 1e9


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Median time of one call, after three that warm up."""
    for _ in range(3):
        action()
    return median(_cuda_times(action) if device.type == "cuda" else _cpu_times(action))


def _cpu_times(action: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


def _cuda_times(action: Callable[[], object]) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
