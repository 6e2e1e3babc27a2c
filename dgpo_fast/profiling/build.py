"""From what was recorded, counted and traced to a `Report`."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from dgpo_fast.learning.optimizers import optimizer_tensors
from dgpo_fast.models.loading import text_encoders
from dgpo_fast.models.work import BACKWARD, BOTH, DECODE, OLD, PARTS_OF_TRAINING, POLICY, REFERENCE, ROLLOUT, ModelWork
from dgpo_fast.profiling import trace as tracing
from dgpo_fast.profiling.power import HEAT, POWER_CAP, PowerMeter, energy_between_j
from dgpo_fast.profiling.recorder import TRAIN, MemoryWatch, Recording
from dgpo_fast.profiling.report import (
    Candidate,
    Device,
    Gaps,
    GpuTrace,
    Iteration,
    Memory,
    Operation,
    Operations,
    Phase,
    PhaseLaunches,
    Power,
    Process,
    Processes,
    Rewards,
    Span,
    Throughput,
    Times,
    Work,
)
from dgpo_fast.records import JsonObject
from dgpo_fast.trainer import Trainer

OTHER = "other"
HOTTEST = 20


def times(values: Iterable[float]) -> Times:
    """Median and the quantiles 0.2 and 0.8."""
    low, median, high = np.quantile(list(values), (0.2, 0.5, 0.8))
    return Times(median_s=float(median), low_s=float(low), high_s=float(high))


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds that at least one of `spans` covers."""
    return sum(end - start for start, end in tracing.merged((span.start_s, span.end_s) for span in spans))


def iteration_rows(recordings: Sequence[Recording]) -> list[Iteration]:
    """The recorded iterations, from the start of the first."""
    zero = recordings[0].start_s
    return [
        Iteration(
            start_s=r.start_s - zero,
            seconds=r.end_s - r.start_s,
            images=r.metrics["images_count"],
            spans=sorted(r.spans, key=lambda span: span.start_s),
        )
        for r in recordings
    ]


def phase_rows(recordings: Sequence[Recording]) -> list[Phase]:
    """Seconds and peak memory per phase in the order in which phases begin, and what lies in none."""
    whole = times(r.end_s - r.start_s for r in recordings).median_s
    outer = [[span for span in r.spans if span.inside is None] for r in recordings]
    ordered = sorted((span.start_s, span.name) for span in outer[0])
    later = sorted({span.name for spans in outer[1:] for span in spans})
    rows = []
    for name in dict.fromkeys([*(name for _, name in ordered), *later]):
        seconds = times(covered_s(span for span in spans if span.name == name) for spans in outer)
        peak = max(r.peak_mib.get(name, 0.0) for r in recordings)
        rows.append(Phase(name=name, times=seconds, share_percent=100 * seconds.median_s / whole, peak_memory_mib=peak))
    rest = times(r.end_s - r.start_s - covered_s(spans) for r, spans in zip(recordings, outer, strict=True))
    return [*rows, Phase(name=OTHER, times=rest, share_percent=100 * rest.median_s / whole)]


def kind_seconds(recording: Recording) -> dict[str, float]:
    """Seconds of each kind of work in one iteration. The backward pass is what training forwards leave of training."""
    phases = {name: covered_s(s for s in recording.spans if s.name == name) for name in (ROLLOUT, DECODE, TRAIN)}
    forwards = {
        name: covered_s(s for s in recording.spans if s.name == name and s.inside == TRAIN)
        for name in (REFERENCE, OLD, POLICY)
    }
    rest = phases.pop(TRAIN) - covered_s(span for span in recording.spans if span.inside == TRAIN)
    return {**phases, **forwards, BACKWARD: rest}


def work_rows(
    recordings: Sequence[Recording],
    model_work: ModelWork,
    batches: dict[str, int],
    matmul_tflops: float,
    decodes_beside: bool = False,
) -> list[Work]:
    """FLOPs, bytes and rates of each kind of work that the iterations did, at the medians of samples and seconds.

    Args:
        batches: samples in one forward or decode, by kind.
        decodes_beside: whether decoding overlaps with the rollout, so that their seconds are those of both together.
    """
    rows = []
    seconds = [kind_seconds(recording) for recording in recordings]
    kinds: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in (ROLLOUT, DECODE, REFERENCE, OLD, POLICY, BACKWARD)}
    if decodes_beside:
        kinds = {BOTH: (ROLLOUT, DECODE), **{kind: parts for kind, parts in kinds.items() if kind in PARTS_OF_TRAINING}}
    for name, parts in kinds.items():
        samples = [int(np.median([recording.samples.get(kind, 0) for recording in recordings])) for kind in parts]
        spent = float(np.median([sum(row[kind] for kind in parts) for row in seconds]))
        if not any(samples) or spent <= 0:
            continue
        flops, moved = _work(model_work, batches, dict(zip(parts, samples, strict=True)))
        total, moved_total = sum(flops.values()), sum(moved.values())
        rate = total / spent / 1e12
        rows.append(
            Work(
                name=name,
                seconds=spent,
                samples=samples[0],
                tflop=total / 1e12,
                tflops=rate,
                of_matmul_percent=100 * rate / matmul_tflops,
                gbytes=moved_total / 1e9,
                flop_per_byte=total / moved_total,
            )
        )
    return rows


def _work(
    model_work: ModelWork, batches: dict[str, int], samples: dict[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs and bytes by class of operation of the given number of samples of each kind of work."""
    flops: dict[str, float] = {}
    moved: dict[str, float] = {}
    for kind, count in samples.items():
        if count:
            batch = min(batches[kind], count)
            counted = model_work.count(kind, batch)
            for name in counted.bytes:
                flops[name] = flops.get(name, 0.0) + counted.flops[name] * count / batch
                moved[name] = moved.get(name, 0.0) + counted.bytes[name] * count / batch
    return flops, moved


def operation_rows(
    operations: Sequence[tracing.Operation], samples: dict[str, int], model_work: ModelWork, batches: dict[str, int]
) -> list[Operations]:
    """Time of the traced iteration by class of operation, with the FLOPs and bytes that the models need of each."""
    flops, moved = _work(model_work, batches, samples)
    total_ms = sum(operation.total_ms for operation in operations)
    rows = []
    for name in ("matmul", "attention", "convolution", OTHER):
        seconds = sum(operation.total_ms for operation in operations if operation.kind == name) / 1e3
        if seconds > 0:
            rows.append(
                Operations(
                    kind=name,
                    seconds=seconds,
                    share_percent=1e5 * seconds / total_ms,
                    tflop=flops.get(name, 0.0) / 1e12,
                    tflops=flops.get(name, 0.0) / 1e12 / seconds,
                    gbytes=moved.get(name, 0.0) / 1e9,
                    gb_per_s=moved.get(name, 0.0) / 1e9 / seconds,
                )
            )
    return rows


def hottest_rows(operations: Sequence[tracing.Operation]) -> list[Operation]:
    """The twenty that took longest."""
    total_ms = sum(operation.total_ms for operation in operations)
    return [
        Operation(
            name=o.name, kind=o.kind, calls=o.calls, total_ms=o.total_ms, share_percent=100 * o.total_ms / total_ms
        )
        for o in operations[:HOTTEST]
    ]


def gpu_trace(events: list[tracing.Event]) -> GpuTrace:
    """Launches, gaps and busy share of the traced iteration and of its phases."""
    (window,) = tracing.annotation(events, tracing.ITERATION)
    gaps = tracing.idle_gaps(events, window)
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    phases = []
    for name in sorted(name for name in names if name.startswith(tracing.PHASE)):
        windows = tracing.annotation(events, name)
        counts = [tracing.launches(events, part) for part in windows]
        length = sum(end - start for start, end in windows)
        idle = sum(sum(tracing.idle_gaps(events, part)) for part in windows)
        launched = {
            key: sum(count[key] for count in counts)
            for key in ("kernels", "kernel_launches", "graph_launches", "synchronisations")
        }
        phases.append(
            (
                windows[0][0],
                PhaseLaunches(
                    name=name.removeprefix(tracing.PHASE), busy_percent=100 * (1 - idle / length), **launched
                ),
            )
        )
    return GpuTrace(
        busy_percent=tracing.busy_percent(events, window),
        idle_ms=sum(gaps) / 1e3,
        **tracing.launches(events, window),
        gaps=[
            Gaps(from_us=b.from_us, to_us=b.to_us, count=b.count, total_ms=b.total_ms) for b in tracing.gap_bins(gaps)
        ],
        phases=[row for _, row in sorted(phases, key=lambda pair: pair[0])],
    )


def throughput(
    recordings: Sequence[Recording], tflop: float, device: Device, executed_tflop: float | None = None
) -> Throughput:
    """Speed of the median iteration; its rates are of the useful `tflop`."""
    iteration = times(r.end_s - r.start_s for r in recordings)
    images = int(np.median([r.metrics["images_count"] for r in recordings]))
    rate = tflop / iteration.median_s
    return Throughput(
        iteration=iteration,
        images=images,
        images_per_s=images / iteration.median_s,
        tflop_per_iteration=tflop,
        achieved_tflops=rate,
        mfu_percent=100 * rate / device.datasheet_tflops if device.datasheet_tflops else None,
        of_matmul_percent=100 * rate / device.matmul_tflops,
        executed_tflop=executed_tflop,
    )


def memory_row(watch: MemoryWatch, recordings: Sequence[Recording], trainer: Trainer) -> Memory:
    """Memory over time, thinned to what a chart can show."""
    zero = recordings[0].start_s
    on_gpu = watch.device.type == "cuda"
    inside = [(t - zero, mib) for t, mib in watch.samples if zero <= t <= recordings[-1].end_s]
    peaks = [mib for recording in recordings for mib in recording.peak_mib.values()]
    return Memory(
        what="allocated by torch on the GPU" if on_gpu else "resident memory of the process",
        samples=thinned(inside, 600),
        peak_mib=max([*peaks, *(mib for _, mib in inside)]),
        reserved_mib=torch.cuda.max_memory_reserved(watch.device) / 2**20 if on_gpu else None,
        held_mib=held_mib(trainer),
        predicted_mib=trainer.memory.predicted_bytes(trainer.config) / 2**20,
    )


def thinned(samples: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about `most` samples; of each run of neighbours the highest, so that no peak is lost."""
    width = -(-len(samples) // most) or 1
    return [max(samples[i : i + width], key=lambda sample: sample[1]) for i in range(0, len(samples), width)]


def held_mib(trainer: Trainer) -> dict[str, float]:
    """Memory that weights, averages and optimizer states take on the device; what is shared counts once."""
    models, encoders = trainer.models, trainer.encoder.encoders
    owners = {
        "base transformer": _tensors(models.base),
        "behaviour copy": _tensors(models.behaviour),
        "policy's own weights": _tensors(models.policy),
        "decoder": [*_tensors(trainer.pipeline.vae), *_tensors(trainer.engine.decoder.vae)],
        "prompt encoders": [t for encoder in text_encoders(encoders) for t in _tensors(encoder)] if encoders else [],
        "averages": [t for average in trainer.learner.averages.values() for t in average.weights.values()],
        "optimizer states": list(optimizer_tensors(trainer.learner.optimizer).values()),
    }
    seen: set[int] = set()
    held = {}
    for name, tensors in owners.items():
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if t.device.type == trainer.device.type
        }
        held[name] = sum(size for pointer, size in storages.items() if pointer not in seen) / 2**20
        seen |= set(storages)
    return {name: mib for name, mib in held.items() if mib > 0}


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers; of a sharded parameter the part that is here."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in [*module.parameters(), *module.buffers()]]


def power_row(meter: PowerMeter, recordings: Sequence[Recording], images: float) -> Power | None:
    """Power and energy from the start of the first to the end of the last measured iteration."""
    start, end = recordings[0].start_s, recordings[-1].end_s
    inside = [sample for sample in meter.samples if start <= sample.time_s <= end]
    if not inside:
        return None
    energy = energy_between_j(meter.samples, start, end)
    clocks = [sample.sm_clock_mhz for sample in inside]
    return Power(
        mean_w=energy / (end - start),
        max_w=max(sample.power_w for sample in inside),
        limit_w=meter.power_limit_w,
        energy_j=energy,
        energy_per_image_j=energy / images,
        sm_clock_median_mhz=float(np.median(clocks)),
        sm_clock_min_mhz=min(clocks),
        memory_clock_median_mhz=float(np.median([sample.memory_clock_mhz for sample in inside])),
        utilisation_mean_percent=float(np.mean([sample.utilisation_percent for sample in inside])),
        temperature_max_c=max(sample.temperature_c for sample in inside),
        power_capped_percent=100 * float(np.mean([bool(sample.reasons & POWER_CAP) for sample in inside])),
        heat_limited_percent=100 * float(np.mean([bool(sample.reasons & HEAT) for sample in inside])),
        samples=[
            (s.time_s - start, s.power_w, s.sm_clock_mhz, s.utilisation_percent)
            for s in inside[:: -(-len(inside) // 600)]
        ],
    )


def processes_row(recordings: Sequence[Recording]) -> Processes | None:
    """How even the work of several processes was; None of one alone."""
    if any("processes" not in recording.metrics for recording in recordings):
        return None
    everyone = zip(*(recording.metrics["processes"] for recording in recordings), strict=True)
    rows = []
    for number, lines in enumerate(everyone):
        names = dict.fromkeys(name for line in lines for name in line)
        seconds = {name.removesuffix("_s"): float(np.median([line.get(name, 0.0) for line in lines])) for name in names}
        rows.append(Process(number=number, waited_s=seconds.pop("waited"), phases=seconds))
    imbalance = float(np.median([recording.metrics["imbalance"] for recording in recordings]))
    return Processes(imbalance=imbalance, rows=rows)


def rewards_row(recordings: Sequence[Recording]) -> Rewards | None:
    """Reward time that overlapped with other work, if the run's rewards report it."""
    if any("reward_busy_s" not in recording.metrics for recording in recordings):
        return None
    busy, wait = (float(np.median([r.metrics[f"reward_{name}_s"] for r in recordings])) for name in ("busy", "wait"))
    return Rewards(busy_s=busy, wait_s=wait, hidden_s=max(0.0, busy - wait))


def candidates(timings: Iterable[JsonObject]) -> dict[str, list[Candidate]]:
    """Tables of the report from what the engine timed before it chose.

    Args:
        timings: of each candidate what it is "for", its "name", "forward_ms" and "backward_ms" if they were
            measured, whether it was "chosen", and as "obstacle" why it was not available.
    """
    tables: dict[str, list[Candidate]] = {}
    for timing in timings:
        tables.setdefault(timing["for"], []).append(
            Candidate(
                name=timing["name"],
                forward_ms=timing["forward_ms"],
                backward_ms=timing["backward_ms"],
                chosen=timing["chosen"],
                note=timing["obstacle"] or "",
            )
        )
    return tables
