"""Rows of the report from recordings worked by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgpo_fast.config.options import Policy
from dgpo_fast.models.work import ModelWork
from dgpo_fast.profiling import build, rates
from dgpo_fast.profiling.rates import measure_rates
from dgpo_fast.profiling.recorder import Recording
from dgpo_fast.profiling.report import Span
from tests.sd3 import sample_shape, transformer_in


def recording(start_s: float, train_s: float) -> Recording:
    """Two rollouts of a second around a reward that overlaps the second, then training with two forwards."""
    spans = [
        Span(name="rollout", start_s=0.0, end_s=1.0),
        Span(name="rollout", start_s=1.0, end_s=2.0),
        Span(name="reward", start_s=1.5, end_s=2.5),
        Span(name="train", start_s=3.0, end_s=3.0 + train_s),
        Span(name="policy forward", start_s=3.0, end_s=3.5, inside="train"),
        Span(name="reference forward", start_s=3.5, end_s=3.75, inside="train"),
    ]
    return Recording(
        start_s,
        start_s + 4.0 + train_s,
        {"images_count": 8, "reward_busy_s": 3.0, "reward_wait_s": 1.0},
        {"rollout": 64},
        spans,
        {"rollout": 100.0 + start_s, "train": 300.0},
    )


RECORDINGS = [recording(10, 2.0), recording(16, 3.0), recording(23, 4.0)]


def test_phases_by_hand() -> None:
    """Iterations take 6, 7 and 8 s. Spans cover 2.5 s and the training; 1.5 s lie in no phase."""
    rows = {row.name: row for row in build.phase_rows(RECORDINGS)}
    assert list(rows) == ["rollout", "reward", "train", "other"]
    assert (rows["rollout"].times.median_s, rows["reward"].times.median_s) == (2.0, 1.0)
    assert (rows["train"].times.low_s, rows["train"].times.median_s) == (pytest.approx(2.4), 3.0)
    assert rows["other"].times.median_s == pytest.approx(1.5)
    assert rows["train"].share_percent == pytest.approx(100 * 3 / 7)
    assert (rows["rollout"].peak_memory_mib, rows["train"].peak_memory_mib) == (123, 300)
    assert rows["other"].peak_memory_mib is None


def test_backward_is_what_forwards_leave_of_training() -> None:
    kinds = build.kind_seconds(RECORDINGS[0])
    assert kinds == {
        "rollout": 2.0,
        "decode": 0.0,
        "reference forward": 0.25,
        "old forward": 0,
        "policy forward": 0.5,
        "backward": 1.25,
    }


def test_iterations_are_counted_from_the_first() -> None:
    rows = build.iteration_rows(RECORDINGS)
    assert [(row.start_s, row.seconds, row.images) for row in rows] == [(0, 6, 8), (6, 7, 8), (13, 8, 8)]


def test_hidden_rewards() -> None:
    row = build.rewards_row(RECORDINGS)
    assert row is not None and (row.busy_s, row.wait_s, row.hidden_s) == (3, 1, 2)
    without = Recording(0, 1, {"images_count": 8})
    assert build.rewards_row([*RECORDINGS, without]) is None


def test_processes_by_hand() -> None:
    """Medians of each process's seconds over three iterations; none of a process alone."""
    lines = [[{"train_s": 1.0, "waited_s": 0.5}, {"train_s": 2.0 + n, "waited_s": 0.0}] for n in range(3)]
    recordings = [
        replace(one, metrics={**one.metrics, "processes": everyone, "imbalance": 1.1 + n})
        for n, (one, everyone) in enumerate(zip(RECORDINGS, lines, strict=True))
    ]
    found = build.processes_row(recordings)
    assert found is not None and found.imbalance == pytest.approx(2.1)
    assert [(row.number, row.waited_s, row.phases) for row in found.rows] == [
        (0, 0.5, {"train": 1.0}),
        (1, 0.0, {"train": 3.0}),
    ]
    assert build.processes_row(RECORDINGS) is None


def test_thinning_keeps_the_peak() -> None:
    samples = [(float(t), float(t == 617)) for t in range(1000)]
    few = build.thinned(samples, 60)
    assert len(few) <= 60 and max(value for _, value in few) == 1.0
    assert build.thinned(samples[:50], 60) == samples[:50]


def test_the_devices_rates_are_plausible() -> None:
    """A matmul of this size does at least as much as one core of ten years ago, and a copy no more than any memory."""
    found = measure_rates(torch.device("cpu"), torch.float32)
    assert 1e-3 < found.matmul_tflops < 100
    assert 0.1 < found.copy_gb_per_s < 2000
    assert found.matmul_burst_tflops == found.matmul_tflops, "a CPU has one rate"


def test_a_sustained_rate_fills_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that get slower as a chip gets warm: 9 of 0.1 s, then 9 of 0.2 s, are 2.7 s in 18 calls."""
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 0.1 if calls[0] <= 9 else 0.2

    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])
    assert rates._sustained_s(call) == pytest.approx(2.7 / 18) and calls[0] == 18


def test_decoding_beside_the_rollout_is_one_kind_of_work(random_pipeline: Path) -> None:
    """Its seconds cannot be told apart, so FLOPs and seconds of both add up."""
    transformer = transformer_in(random_pipeline)
    work = ModelWork(transformer, Policy(lora_rank=4), torch.float32, sample_shape((16, 8, 8), (21, 48), 32))  # type: ignore[arg-type]
    decode = Span(name="decode", start_s=2.5, end_s=3.0)
    samples = {"rollout": 64, "decode": 8}
    recordings = [replace(r, samples=samples, spans=[*r.spans, decode]) for r in RECORDINGS]
    batches = {"rollout": 16, "decode": 8}
    apart, (together,) = (
        build.work_rows(recordings, work, batches, 0.1, decodes_beside=beside) for beside in (False, True)
    )
    assert [row.name for row in apart] == ["rollout", "decode"] and together.name == "rollout with decode"
    assert together.tflop == pytest.approx(sum(row.tflop for row in apart))
    assert together.gbytes == pytest.approx(sum(row.gbytes for row in apart))
    assert together.seconds == pytest.approx(2.5) and together.samples == 64


def test_candidates_become_tables() -> None:
    rows = build.candidates(
        [
            {
                "for": "attention of rollouts",
                "name": "native",
                "forward_ms": 1.5,
                "backward_ms": None,
                "obstacle": None,
                "chosen": True,
            },
            {
                "for": "attention of rollouts",
                "name": "cudnn",
                "forward_ms": None,
                "backward_ms": None,
                "obstacle": "needs a GPU",
                "chosen": False,
            },
        ]
    )
    assert [(c.name, c.forward_ms, c.chosen, c.note) for c in rows["attention of rollouts"]] == [
        ("native", 1.5, True, ""),
        ("cudnn", None, False, "needs a GPU"),
    ]
    assert build.candidates([]) == {}
