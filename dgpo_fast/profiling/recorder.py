"""Watches a trainer's iterations: when each phase and each training forward ran, and how much memory was in use."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import psutil
import torch
from torch.utils.hooks import RemovableHandle

from dgpo_fast.models.work import OLD, POLICY, REFERENCE
from dgpo_fast.profiling.report import Span
from dgpo_fast.records import Metrics
from dgpo_fast.trainer import Trainer

TRAIN = "train"
Mark = torch.cuda.Event | float
"""A moment: an event on a GPU, `time.perf_counter` on a CPU."""


@dataclass
class Recording:
    """One iteration as it was watched; times by `time.perf_counter`."""

    start_s: float
    end_s: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    peak_mib: dict[str, float] = field(default_factory=dict)
    executed: dict[str, int] = field(default_factory=dict)


class MemoryWatch:
    """Memory in use: what torch has allocated on a GPU, or the process's resident memory on a CPU.

    Attributes:
        samples: (time by `time.perf_counter`, MiB), taken in a thread between `start` and `stop`.
    """

    EVERY_S = 0.02

    def __init__(self, device: torch.device):
        self.device = device
        self.process = psutil.Process()
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)

    def start(self) -> None:
        """Begins sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Ends sampling."""
        self._stop.set()
        self._thread.join()

    def now_mib(self) -> float:
        """Memory in use now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 2**20
        return self.process.memory_info().rss / 2**20

    @contextmanager
    def peak(self, record: Callable[[float], None]) -> Iterator[None]:
        """Tells `record` the most memory in use inside the block: exactly on a GPU, of the samples on a CPU."""
        start = len(self.samples)
        before = self.now_mib()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.device.type == "cuda":
            record(torch.cuda.max_memory_allocated(self.device) / 2**20)
        else:
            record(max(before, self.now_mib(), *(mib for _, mib in self.samples[start:])))

    def _watch(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            self.samples.append((time.perf_counter(), self.now_mib()))


class ForwardClock:
    """Times forwards without making the host wait: CUDA events on a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Mark, Mark]] = []
        self._started: dict[str, Mark] = {}
        self._zero = self._mark()
        if self.on_gpu:
            torch.cuda.synchronize(device)
        self._zero_s = time.perf_counter()

    def hook(self, name: str, module: torch.nn.Module) -> list[RemovableHandle]:
        """Times every forward of `module` as `name`; returns the hooks to remove."""
        return [
            module.register_forward_pre_hook(partial(self._on_start, name)),
            module.register_forward_hook(partial(self._on_end, name)),
        ]

    def take(self) -> list[tuple[str, float, float]]:
        """Name, start and end by `time.perf_counter` of the forwards since the last call; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        taken = [(name, self._seconds(start), self._seconds(end)) for name, start, end in self.marks]
        self.marks = []
        return taken

    def _on_start(self, name: str, *_: object) -> None:
        # A forward that is recorded into a CUDA graph does not run yet.
        if not (self.on_gpu and torch.cuda.is_current_stream_capturing()):
            self._started[name] = self._mark()

    def _on_end(self, name: str, *_: object) -> None:
        if name in self._started:
            self.marks.append((name, self._started.pop(name), self._mark()))

    def _mark(self) -> Mark:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark
        assert isinstance(self._zero, torch.cuda.Event)
        return self._zero_s + self._zero.elapsed_time(mark) / 1e3


class Recorder:
    """Records iterations of one trainer.

    Args:
        trainer: its phases, transformers and work meter are watched while the recorder is.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.memory = MemoryWatch(trainer.device)
        self.recordings: list[Recording] = []
        self._clock = ForwardClock(trainer.device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches inside the block."""
        trainer, models = self.trainer, self.trainer.models
        hooks = [
            hook
            for name, module in ((REFERENCE, models.base), (OLD, models.behaviour), (POLICY, models.policy))
            for hook in self._clock.hook(name, module)
        ]
        before, trainer.phases.watch = trainer.phases.watch, self._phase
        self.memory.start()
        try:
            yield
        finally:
            self.memory.stop()
            trainer.phases.watch = before
            for hook in hooks:
                hook.remove()

    def step(self) -> None:
        """One iteration of the trainer, recorded."""
        recording = Recording(time.perf_counter())
        self.recordings.append(recording)
        recording.metrics = self.trainer.step()
        recording.end_s = time.perf_counter()
        recording.samples, recording.executed = dict(self.trainer.work.last), dict(self.trainer.work.last_executed)
        training = [span for span in recording.spans if span.name == TRAIN]
        for name, start, end in self._clock.take():
            start, end = start - recording.start_s, end - recording.start_s
            if any(span.start_s <= start and end <= span.end_s for span in training):
                recording.spans.append(Span(name=name, start_s=start, end_s=end, inside=TRAIN))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        recording = self.recordings[-1]
        start = time.perf_counter() - recording.start_s

        def keep_peak(mib: float) -> None:
            recording.peak_mib[name] = max(mib, recording.peak_mib.get(name, 0.0))

        with self.memory.peak(keep_peak):
            yield
        recording.spans.append(Span(name=name, start_s=start, end_s=time.perf_counter() - recording.start_s))
