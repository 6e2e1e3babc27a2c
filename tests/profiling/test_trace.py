"""Traces: launches, gaps, busy share and own times of small traces worked by hand."""

import gzip
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.models.work import operation_class
from dgpo_fast.profiling import build
from dgpo_fast.profiling import trace as tracing


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> tracing.Event:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}


# One iteration of 1000 µs: two phases, four kernels on two streams, a copy, a graph, a wait.
GPU = [
    event("user_annotation", "iteration", 0, 1000),
    event("user_annotation", "phase: rollout", 0, 600),
    event("user_annotation", "phase: train", 600, 400),
    event("cuda_runtime", "cudaLaunchKernel", 5, 3),
    event("cuda_runtime", "cudaGraphLaunch", 90, 3),
    event("cuda_driver", "cuLaunchKernelEx", 610, 3),
    event("cuda_runtime", "cudaStreamSynchronize", 950, 40),
    event("cuda_runtime", "cudaMalloc", 950, 40),
    event("cuda_runtime", "cudaLaunchKernel", 1200, 3),
    event("kernel", "nvjet_tst_128x256", 100, 200, tid=7),
    event("kernel", "fmha_cutlassF_bf16", 250, 150, tid=8),  # overlaps the one before
    event("kernel", "nvjet_tst_128x256", 401, 99, tid=7),  # a gap of 1 µs
    event("gpu_memcpy", "Memcpy DtoH", 550, 10, tid=9),  # a gap of 50 µs
    event("kernel", "vectorized_elementwise_kernel", 700, 250, tid=7),  # a gap of 140 µs
    event("kernel", "after the end", 1500, 10, tid=7),
]


def test_gaps_and_busy_share_by_hand() -> None:
    """Busy: 100–400, 401–500, 550–560, 700–950 = 659 µs; the rest are gaps, both ends among them."""
    assert tracing.idle_gaps(GPU, (0, 1000)) == [100, 1, 50, 140, 50]
    assert tracing.busy_percent(GPU, (0, 1000)) == 65.9
    bins = tracing.gap_bins([100, 1, 50, 140, 50])
    assert [(b.from_us, b.to_us, b.count, b.total_ms) for b in bins] == [
        (0, 2, 1, 0.001),
        (2, 10, 0, 0),
        (10, 100, 2, 0.1),
        (100, 1000, 2, 0.24),
        (1000, 10_000, 0, 0),
        (10_000, None, 0, 0),
    ]


def test_launches_by_hand() -> None:
    """What lies outside the window does not count, nor does an allocation."""
    assert tracing.launches(GPU, (0, 1000)) == {
        "kernels": 4,
        "copies": 1,
        "fills": 0,
        "kernel_launches": 2,
        "graph_launches": 1,
        "synchronisations": 1,
    }


def test_kernels_by_class_and_time() -> None:
    rows = tracing.kernels(GPU, (0, 1000))
    assert [(row.name, row.kind, row.calls, row.total_ms) for row in rows] == [
        ("nvjet_tst_128x256", "matmul", 2, 0.299),
        ("vectorized_elementwise_kernel", "other", 1, 0.25),
        ("fmha_cutlassF_bf16", "attention", 1, 0.15),
        ("Memcpy DtoH", "other", 1, 0.01),
    ]


def test_kernel_classes() -> None:
    names = {
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matmul",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn": "matmul",
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>(Flash_fwd_params)": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x64": "attention",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x256x64": "convolution",
        "triton_poi_fused_gelu_0": "other",
        "Memset (Device)": "other",
    }
    assert {name: tracing.kernel_class(name) for name in names} == names


def test_operation_classes() -> None:
    names = {
        "aten::addmm": "matmul",
        "aten::linear": "matmul",
        "mkldnn::_linear_pointwise": "matmul",
        "aten::_scaled_mm": "matmul",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "flash_attn::_flash_attn_forward": "attention",
        "aten::mkldnn_convolution": "convolution",
        "dgpo_fast::linear_weight_gradient": "matmul",
        "aten::upsample_bilinear2d": "other",
        "aten::gelu": "other",
        "aten::native_layer_norm": "other",
    }
    assert {name: operation_class(name) for name in names} == names


def test_gpu_trace_splits_by_phase() -> None:
    """Rollout: kernels busy 100–400, 401–500, 550–560 of 600 µs; training: 700–950 of 400 µs."""
    found = build.gpu_trace(GPU)
    assert round(found.idle_ms, 6) == 0.341
    rollout, train = found.phases
    assert (rollout.name, rollout.kernels, rollout.kernel_launches, rollout.graph_launches) == ("rollout", 3, 1, 1)
    assert round(rollout.busy_percent, 6) == round(100 * 409 / 600, 6)
    assert (train.name, train.busy_percent, train.kernel_launches, train.synchronisations) == ("train", 62.5, 1, 1)


def test_own_times_of_nested_operations() -> None:
    """linear (100 µs) calls addmm (70), which calls copy (20); another thread and a later call add up."""
    events = [
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::addmm", 10, 70),
        event("cpu_op", "aten::copy_", 20, 20),
        event("cpu_op", "aten::addmm", 100, 30),
        event("cpu_op", "aten::addmm", 0, 5, tid=2),
        event("cpu_op", "aten::addmm", 5000, 5),
    ]
    rows = tracing.cpu_operations(events, (0, 1000))
    assert [(row.name, row.kind, row.calls, row.total_ms) for row in rows] == [
        ("aten::addmm", "matmul", 3, 0.085),
        ("aten::linear", "matmul", 1, 0.03),
        ("aten::copy_", "other", 1, 0.02),
    ]


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    """Events that mark a moment or name a thread are left out."""
    content = json.dumps({"traceEvents": [GPU[0], {"ph": "M", "name": "process_name"}, {"ph": "i", "ts": 3}]})
    (tmp_path / "plain.json").write_text(content)
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("plain.json", "packed.json.gz"):
        assert tracing.read_trace(tmp_path / name) == [GPU[0]]


intervals = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 30)), max_size=20)


@given(intervals)
def test_gaps_are_what_no_kernel_covers(spans: list[tuple[int, int]]) -> None:
    """Against counting microsecond by microsecond."""
    events = [event("kernel", "k", start, length) for start, length in spans]
    busy = {t for start, length in spans for t in range(start, start + length)}
    assert sum(tracing.idle_gaps(events, (10, 100))) == sum(t not in busy for t in range(10, 100))
