"""Runs a trainer's iterations under observation and makes the report of them."""

import gc
import shlex
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from dgpo_fast.config.reading import flat
from dgpo_fast.lifecycle import stepping
from dgpo_fast.models.work import DECODE, ROLLOUT
from dgpo_fast.profiling import build
from dgpo_fast.profiling import trace as tracing
from dgpo_fast.profiling.machine import device_row, versions
from dgpo_fast.profiling.power import PowerMeter
from dgpo_fast.profiling.rates import Rates, measure_rates
from dgpo_fast.profiling.recorder import Recorder
from dgpo_fast.profiling.report import Report
from dgpo_fast.trainer import Trainer

TRACE_FILE = "trace.json.gz"


class Session:
    """A profile of one trainer: iterations that warm up, iterations that are measured, and one that is traced.

    The traced one is apart because tracing slows it down. Of several processes each has a session, and the first one
    traces and reports.

    Args:
        trainer: ready to step; nothing of its run is written.
        folder: where the trace goes.
    """

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self.folder = trainer, folder

    def run(self, warmup: int, measured: int, args: list[str]) -> Report | None:
        """The report of `measured` iterations after `warmup` others; `args` are those of the command line.

        None on processes other than the first.
        """
        trainer = self.trainer
        with trainer.processes.together("the encoded prompts"):
            trainer.encode_prompts()
        with stepping(trainer, self.folder, lambda: False):
            for _ in range(warmup):
                trainer.step()
            recorder, meter = self._measure(measured)
            if not trainer.processes.first:
                trainer.step()  # which the first one traces
                return None
            events, traced_s = self._trace()
        trainer.console.note("measuring the device's own rates, counting FLOPs and bytes")
        rates = measure_rates(trainer.device, trainer.models.dtype)
        return self._report(warmup, args, recorder, meter, events, traced_s, rates)

    def _measure(self, count: int) -> tuple[Recorder, PowerMeter]:
        recorder, meter = Recorder(self.trainer), PowerMeter(self.trainer.device)
        gc.collect()
        meter.start()
        try:
            with recorder.watching():
                for _ in range(count):
                    recorder.step()
        finally:
            meter.stop()
        return recorder, meter

    def _trace(self) -> tuple[list[tracing.Event], float]:
        """The events of one traced iteration, and its seconds."""
        trainer = self.trainer
        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            with torch_profile(activities=activities):
                torch.zeros(1, device=trainer.device)  # the tracer's own start-up is not the iteration's
        before = trainer.phases.watch
        trainer.phases.watch = lambda name: record_function(tracing.PHASE + name)
        try:
            with torch_profile(activities=activities) as profiler, record_function(tracing.ITERATION):
                trainer.step()
        finally:
            trainer.phases.watch = before
        trainer.console.note("writing the trace")
        path = self.folder / TRACE_FILE
        profiler.export_chrome_trace(str(path))
        events = tracing.read_trace(path)
        ((start_us, end_us),) = tracing.annotation(events, tracing.ITERATION)
        return events, (end_us - start_us) / 1e6

    def _report(
        self,
        warmup: int,
        args: list[str],
        recorder: Recorder,
        meter: PowerMeter,
        events: list[tracing.Event],
        traced_s: float,
        rates: Rates,
    ) -> Report:
        trainer, config, recordings = self.trainer, self.trainer.config, recorder.recordings
        device = device_row(trainer.device, trainer.models.dtype, rates)
        model_work = trainer.work.model_work()
        batches = trainer.work.batches | {
            ROLLOUT: trainer.draw.batch_size * trainer.draw.forwards_per_step,
            DECODE: trainer.engine.decoder.batch_size,
        }
        work = build.work_rows(
            recordings, model_work, batches, rates.matmul_tflops, decodes_beside=trainer.engine.decoder.overlaps
        )
        executed = median(trainer.work.flops(recording.executed) for recording in recordings) / 1e12
        (window,) = tracing.annotation(events, tracing.ITERATION)
        on_gpu = trainer.device.type == "cuda"
        operations = tracing.kernels(events, window) if on_gpu else tracing.cpu_operations(events, window)
        count = trainer.processes.count
        images = sum(recording.metrics["images_count"] for recording in recordings) / count
        notes = [f"images are those of all {count} processes, everything else is process 0's"] if count > 1 else []
        return Report(
            recipe=config.recipe,
            model=config.model,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", "-m", "dgpo_fast.profile", *args]),
            warmup_iterations=warmup,
            traced_iteration_s=traced_s,
            trace_file=TRACE_FILE,
            device=device,
            throughput=build.throughput(recordings, sum(row.tflop for row in work), device, executed),
            iterations=build.iteration_rows(recordings),
            phases=build.phase_rows(recordings),
            work=work,
            operations=build.operation_rows(operations, trainer.work.last, model_work, batches),
            hottest=build.hottest_rows(operations),
            memory=build.memory_row(recorder.memory, recordings, trainer),
            gpu=build.gpu_trace(events) if on_gpu else None,
            power=build.power_row(meter, recordings, images),
            rewards=build.rewards_row(recordings),
            candidates=build.candidates(
                [*trainer.engine.attention_rows(), *trainer.engine.decoder_rows(trainer.sampler.shape)]
            ),
            processes=build.processes_row(recordings),
            notes=[*notes, meter.note] if meter.note else notes,
            settings=flat(config),
            versions=versions(trainer.device, meter.driver),
        )
