"""A report as a GPU would give it, with every section that a page can have. The numbers are made up."""

from dgpo_fast.config.reading import flat
from dgpo_fast.config.recipes import get_recipe
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
    Report,
    Rewards,
    Span,
    Throughput,
    Times,
    Work,
)

PHASES = {"encode": 0.02, "rollout": 9.1, "decode": 1.4, "reward": 0.3, "train": 8.2, "optimizer": 0.05}
HOSTILE = "</script><script>document.title='owned'</script><img src=https://example.com/x.png onerror=alert(1)>"


def times(median_s: float) -> Times:
    return Times(median_s=median_s, low_s=0.98 * median_s, high_s=1.03 * median_s)


def gpu_report() -> Report:
    """Three iterations of 128 images on one GPU."""
    total = sum(PHASES.values()) + 0.03
    return Report(
        recipe="sd35m-geneval",
        model="stabilityai/stable-diffusion-3.5-medium",
        created="2026-01-02T03:04:05+00:00",
        command="python -m dgpo_fast.profile sd35m-geneval",
        warmup_iterations=2,
        traced_iteration_s=19.9,
        trace_file="trace.json.gz",
        device=Device(
            kind="cuda",
            name="NVIDIA H200",
            dtype="bfloat16",
            matmul_tflops=790,
            matmul_size=8192,
            copy_gb_per_s=4300,
            copy_mib=1024,
            memory_mib=143_000,
            datasheet_tflops=989,
            datasheet_source="NVIDIA H200 datasheet",
        ),
        throughput=Throughput(
            iteration=times(total),
            images=128,
            images_per_s=128 / total,
            tflop_per_iteration=10_840,
            achieved_tflops=10_840 / total,
            mfu_percent=10_840 / total / 9.89,
            of_matmul_percent=10_840 / total / 7.9,
        ),
        iterations=[iteration(index, total) for index in range(3)],
        phases=[
            Phase(name=name, times=times(s), share_percent=100 * s / total, peak_memory_mib=20_000 + 8_000 * s)
            for name, s in PHASES.items()
        ]
        + [Phase(name="other", times=times(0.03), share_percent=3 / total)],
        work=[
            work("rollout", 9.1, 2560, 5693, 6.2),
            work("decode", 1.4, 128, 322, 0.9),
            work("reference forward", 1.8, 512, 1138, 1.2),
            work("old forward", 1.8, 512, 1138, 1.2),
            work("policy forward", 1.9, 512, 1162, 1.4),
            work("backward", 2.7, 512, 1392, 2.6),
        ],
        operations=[
            operations("matmul", 13.1, 8900, 3.3),
            operations("attention", 3.2, 1600, 0.4),
            operations("convolution", 1.1, 316, 0.3),
            operations("other", 1.9, 0, 6.5),
        ],
        hottest=[
            Operation(
                name=f"void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_{index}>(Params)",
                kind="matmul",
                calls=9_000 // index,
                total_ms=4_000 / index,
                share_percent=20 / index,
            )
            for index in range(1, 21)
        ],
        memory=Memory(
            what="allocated by torch on the GPU",
            peak_mib=92_000,
            reserved_mib=97_000,
            predicted_mib=88_000,
            samples=[(0.1 * index, 30_000 + 50_000 * ((index % 190) > 110)) for index in range(570)],
            held_mib={
                "base transformer": 4278,
                "behaviour copy": 4278,
                "policy's own weights": 143,
                "decoder": 160,
                "averages": 286,
                "optimizer states": 286,
            },
        ),
        gpu=GpuTrace(
            busy_percent=96.1,
            idle_ms=760,
            kernels=181_000,
            copies=420,
            fills=96,
            kernel_launches=52_000,
            graph_launches=8,
            synchronisations=64,
            gaps=[
                Gaps(from_us=low, to_us=high, count=count, total_ms=ms)
                for low, high, count, ms in (
                    (0, 2, 90_000, 80),
                    (2, 10, 11_000, 40),
                    (10, 100, 900, 30),
                    (100, 1_000, 90, 20),
                    (1_000, 10_000, 20, 90),
                    (10_000, None, 4, 500),
                )
            ],
            phases=[
                PhaseLaunches(
                    name=name,
                    busy_percent=99 - 8 * index,
                    kernels=30_000 * (index + 1),
                    kernel_launches=8_000,
                    graph_launches=index,
                    synchronisations=9,
                )
                for index, name in enumerate(PHASES)
            ],
        ),
        power=Power(
            mean_w=612,
            max_w=702,
            limit_w=700,
            energy_j=612 * 3 * total,
            energy_per_image_j=612 * total / 128,
            sm_clock_median_mhz=1755,
            sm_clock_min_mhz=1380,
            memory_clock_median_mhz=3201,
            utilisation_mean_percent=98,
            temperature_max_c=66,
            power_capped_percent=31,
            heat_limited_percent=0,
            samples=[
                (0.05 * index, 560.0 + 100 * (index % 380 > 200), 1755.0 - 100 * (index % 380 > 200), 98.0)
                for index in range(1100)
            ],
        ),
        rewards=Rewards(busy_s=4.1, wait_s=0.3, hidden_s=3.8),
        candidates={
            "attention": [
                Candidate(name="cudnn", forward_ms=1.21, backward_ms=3.4, chosen=True),
                Candidate(name="flash", forward_ms=1.44, backward_ms=3.9, chosen=False),
                Candidate(name="xformers", forward_ms=None, backward_ms=None, chosen=False, note="not installed"),
            ]
        },
        notes=["weights are random: speed only"],
        settings=flat(get_recipe("sd35m-geneval")),
        versions={"dgpo_fast": "0.1.0", "torch": "2.13.0", "driver": "580.1"},
    )


def iteration(index: int, total: float) -> Iteration:
    spans, start = [], 0.0
    for name, length in PHASES.items():
        spans.append(Span(name=name, start_s=start, end_s=start + length))
        if name == "train":
            for slot in range(4):
                at = start + slot * length / 4
                for part, name_inside in enumerate(("reference forward", "old forward", "policy forward")):
                    spans.append(
                        Span(name=name_inside, start_s=at + 0.4 * part, end_s=at + 0.4 * (part + 1), inside="train")
                    )
        start += length
    return Iteration(start_s=index * total, seconds=total, images=128, spans=spans)


def work(name: str, seconds: float, samples: int, tflop: float, tbytes: float) -> Work:
    rate = tflop / seconds
    return Work(
        name=name,
        seconds=seconds,
        samples=samples,
        tflop=tflop,
        tflops=rate,
        of_matmul_percent=rate / 7.9,
        gbytes=tbytes * 1e3,
        flop_per_byte=tflop / tbytes,
    )


def operations(kind: str, seconds: float, tflop: float, tbytes: float) -> Operations:
    return Operations(
        kind=kind,
        seconds=seconds,
        share_percent=seconds / 0.193,
        tflop=tflop,
        tflops=tflop / seconds,
        gbytes=tbytes * 1e3,
        gb_per_s=tbytes * 1e3 / seconds,
    )
