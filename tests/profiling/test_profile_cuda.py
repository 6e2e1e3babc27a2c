"""On a GPU: a whole profile has every row that a GPU can give, and they agree with one another."""

import itertools
from pathlib import Path

import pytest
import torch

from dgpo_fast.profiling.command import profile
from dgpo_fast.profiling.power import PowerMeter, energy_between_j
from dgpo_fast.profiling.rates import measure_rates
from dgpo_fast.profiling.recorder import ForwardClock
from dgpo_fast.profiling.report import read_report

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_a_whole_profile(workspace: Path) -> None:
    assert profile(["small.yaml", "--device", "cuda", "--name", "gpu", "--measured", "2"]) == 0
    report = read_report(workspace / "runs/gpu")
    gpu = report.gpu
    assert report.device.kind == "cuda" and gpu is not None
    assert 0 < gpu.busy_percent <= 100 and gpu.kernels > 100
    assert gpu.idle_ms == pytest.approx(sum(gap.total_ms for gap in gpu.gaps))
    assert gpu.busy_percent == pytest.approx(100 * (1 - gpu.idle_ms / 1e3 / report.traced_iteration_s), abs=0.1)
    assert {"rollout", "decode", "train", "optimizer"} <= {phase.name for phase in gpu.phases}
    assert sum(phase.kernels for phase in gpu.phases) <= 1.01 * gpu.kernels + 10
    assert report.hottest[0].total_ms > 0 and {row.kind for row in report.operations} >= {"matmul", "other"}
    assert report.memory.reserved_mib is not None and report.memory.peak_mib <= report.memory.reserved_mib
    assert all(work.seconds > 0 for work in report.work)
    # Pictures are decoded beside the rollout, so that neither has seconds of its own.
    names = {work.name for work in report.work}
    assert names >= {"rollout with decode", "policy forward", "backward"} and not names & {"rollout", "decode"}
    assert report.memory.predicted_mib is not None and report.memory.predicted_mib > 0
    assert set(report.candidates) == {"attention of rollouts", "attention of training", "decoding 6 images"}
    kernels = {candidate.name for candidate in report.candidates["attention of rollouts"]}
    assert {"native", "native_flash", "native_cudnn"} <= kernels
    assert all(sum(candidate.chosen for candidate in table) == 1 for table in report.candidates.values())


def test_forwards_are_timed_on_the_gpu() -> None:
    """The clock's seconds are those of a forward made long, and lie where it ran."""
    device = torch.device("cuda")
    module = torch.nn.Linear(4096, 4096, device=device)
    data = torch.randn(65536, 4096, device=device)
    module(data)
    clock = ForwardClock(device)
    hooks = clock.hook("forward", module)
    for _ in range(3):
        module(data)
    spans = clock.take()
    for hook in hooks:
        hook.remove()
    assert [name for name, _, _ in spans] == ["forward"] * 3 and clock.take() == []
    lengths = [end - start for _, start, end in spans]
    assert min(lengths) > 1e-4 and max(lengths) < 10 * min(lengths)
    assert all(first[2] <= second[1] + 1e-3 for first, second in itertools.pairwise(spans))


def test_a_forward_that_is_recorded_into_a_graph_is_not_timed() -> None:
    module, data = torch.nn.Linear(64, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    clock = ForwardClock(torch.device("cuda"))
    hooks = clock.hook("forward", module)
    module(data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(data)
    graph.replay()
    assert len(clock.take()) == 1
    for hook in hooks:
        hook.remove()


def test_the_gpus_rates_are_plausible() -> None:
    rates = measure_rates(torch.device("cuda"), torch.bfloat16)
    assert 1 < rates.matmul_tflops < 5000
    assert 10 < rates.copy_gb_per_s < 20_000


def test_power_is_read() -> None:
    """Skips where the driver does not tell, as in some virtual machines."""
    meter = PowerMeter(torch.device("cuda"))
    if meter.note:
        pytest.skip(meter.note)
    meter.start()
    data = torch.randn(8192, 8192, device="cuda")
    for _ in range(200):
        data @ data
    torch.cuda.synchronize()
    meter.stop()
    assert meter.note is None and len(meter.samples) > 3
    energy = energy_between_j(meter.samples, meter.samples[0].time_s, meter.samples[-1].time_s)
    assert energy > 0
