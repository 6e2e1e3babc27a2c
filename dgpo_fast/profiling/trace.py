"""What a Chrome trace of one iteration says: launches, idle gaps, busy share and the hottest operations.

All functions take the trace's complete events (`"ph": "X"`), as torch.profiler writes them; times are microseconds.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dgpo_fast.models.work import operation_class
from dgpo_fast.records import JsonObject

Event = JsonObject
Interval = tuple[float, float]

ITERATION = "iteration"
PHASE = "phase: "
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
GAP_EDGES_US = (2, 10, 100, 1_000, 10_000)
SYNCHRONISATIONS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
# Kernels by parts of their names, the first match counts; what matches none is "other".
KERNEL_CLASSES = (
    ("attention", r"flash|fmha|attention|sdpa"),
    ("convolution", r"conv|wgrad|dgrad|fprop|implicit_gemm"),
    ("matmul", r"gemm|gemv|cublas|nvjet|cutlass|xmma|_mm_|matmul"),
)


@dataclass(frozen=True)
class GapBin:
    """Idle gaps between two lengths; `to_us` is None for the longest ones."""

    from_us: float
    to_us: float | None
    count: int
    total_ms: float


@dataclass(frozen=True)
class Operation:
    """All calls of one kernel, or of one operation on a CPU, with the time that is its own."""

    name: str
    kind: str
    calls: int
    total_ms: float


def read_trace(path: Path) -> list[Event]:
    """The complete events of a Chrome trace, gzipped or not."""
    content = path.read_bytes()
    trace = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def annotation(events: list[Event], name: str) -> list[Interval]:
    """When the host was inside the annotations called `name`."""
    return [_interval(event) for event in events if event.get("cat") == "user_annotation" and event["name"] == name]


def device_events(events: list[Event], window: Interval | None = None) -> list[Event]:
    """Kernels, copies and fills on the GPU; those that overlap `window` if one is given."""
    found = [event for event in events if event.get("cat") in ON_DEVICE]
    if window is None:
        return found
    return [event for event in found if event["ts"] < window[1] and event["ts"] + event["dur"] > window[0]]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of `intervals`, in order, none touching another."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def idle_gaps(events: list[Event], window: Interval) -> list[float]:
    """Lengths of the times within `window` in which nothing ran on the GPU, its two ends included."""
    busy = merged(_clip(_interval(event), window) for event in device_events(events, window))
    edges = [window[0], *(edge for interval in busy for edge in interval), window[1]]
    lengths = (end - start for start, end in zip(edges[::2], edges[1::2], strict=True))
    return [length for length in lengths if length > 0]


def busy_percent(events: list[Event], window: Interval) -> float:
    """Share of `window` in which at least one thing ran on the GPU."""
    return 100 * (1 - sum(idle_gaps(events, window)) / (window[1] - window[0]))


def gap_bins(gaps: list[float]) -> list[GapBin]:
    """Histogram of idle gaps over `GAP_EDGES_US`."""
    edges = (0, *GAP_EDGES_US)
    bins = []
    for low, high in zip(edges, (*GAP_EDGES_US, None), strict=True):
        inside = [gap for gap in gaps if low <= gap and (high is None or gap < high)]
        bins.append(GapBin(low, high, len(inside), sum(inside) / 1e3))
    return bins


def launches(events: list[Event], window: Interval) -> dict[str, int]:
    """Counts in `window`: kernels, copies and fills on the device; kernel and graph launches and waits on the host."""
    on_device = Counter(event["cat"] for event in device_events(events, window))
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and window[0] <= event["ts"] < window[1]:
            calls[_call_class(event["name"])] += 1
    return {
        "kernels": on_device["kernel"],
        "copies": on_device["gpu_memcpy"],
        "fills": on_device["gpu_memset"],
        "kernel_launches": calls["kernel_launches"],
        "graph_launches": calls["graph_launches"],
        "synchronisations": calls["synchronisations"],
    }


def _call_class(name: str) -> str:
    if "GraphLaunch" in name:
        return "graph_launches"
    if "LaunchKernel" in name or "LaunchCooperativeKernel" in name:
        return "kernel_launches"
    return "synchronisations" if name in SYNCHRONISATIONS else "other"


def kernels(events: list[Event], window: Interval) -> list[Operation]:
    """What ran on the GPU, the longest in total first."""
    totals: dict[str, list[float]] = defaultdict(list)
    for event in device_events(events, window):
        totals[event["name"]].append(event["dur"])
    return _hottest((name, kernel_class(name), len(times), sum(times)) for name, times in totals.items())


def cpu_operations(events: list[Event], window: Interval) -> list[Operation]:
    """Operations on the CPU by the time spent in themselves and not in operations they call, the longest first."""
    threads: dict[object, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op" and window[0] <= event["ts"] < window[1]:
            threads[event["tid"]].append(event)
    own: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for thread in threads.values():
        for event, own_us in _own_times(thread):
            own[event["name"]] += own_us  # type: ignore[assignment]
            calls[event["name"]] += 1
    return _hottest((name, operation_class(name), calls[name], total) for name, total in own.items())


def _own_times(thread: list[Event]) -> Iterable[tuple[Event, float]]:
    """Each event of one thread with its duration less that of the events directly inside it."""
    children: dict[int, float] = defaultdict(float)
    stack: list[int] = []
    ordered = sorted(thread, key=lambda event: (event["ts"], -event["dur"]))
    for index, event in enumerate(ordered):
        while stack and event["ts"] >= ordered[stack[-1]]["ts"] + ordered[stack[-1]]["dur"]:
            stack.pop()
        if stack:
            children[stack[-1]] += event["dur"]
        stack.append(index)
    return [(event, event["dur"] - children[index]) for index, event in enumerate(ordered)]


def kernel_class(name: str) -> str:
    """matmul, attention, convolution or other, by a kernel's name."""
    return next((kind for kind, pattern in KERNEL_CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def _hottest(rows: Iterable[tuple[str, str, int, float]]) -> list[Operation]:
    ordered = sorted(rows, key=lambda row: (-row[3], row[0]))
    return [Operation(name, kind, calls, total_us / 1e3) for name, kind, calls, total_us in ordered]


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _clip(interval: Interval, window: Interval) -> Interval:
    return max(interval[0], window[0]), min(interval[1], window[1])
