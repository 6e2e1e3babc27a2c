"""What processes tell one another in an iteration, on paper, from 1 to 1,024 GPUs.

    python benchmarks/scaling.py            prints the table that docs/scaling.md shows

Nothing here is measured. The gradient is summed once an iteration, after the last micro-batch, so that nothing hides
it: the times are added to the iteration's.
"""

from dataclasses import dataclass

LORA_PARAMETERS = 37.6e6
FULL_PARAMETERS = 2.243e9
"""Of SD3.5-Medium: a LoRA of rank 64 on the attention, and the whole transformer, counted from its definition."""
BYTES = 4
"""Gradients are summed in fp32."""
NVLINK_BYTES_PER_S = 450e9
"""NVLink 4 in one direction: half of the 900 GB/s in NVIDIA's H100 and H200 datasheets."""
INFINIBAND_BYTES_PER_S = 50e9
"""NDR InfiniBand, 400 Gb/s, one adapter a GPU, as in NVIDIA's DGX H100 datasheet."""
STEP_LATENCY_S = 5e-6
"""Of one message of the ring, assumed."""
GPUS_PER_NODE = 8
SAMPLES_PER_GPU = 16
SAMPLE_S = 0.1073
"""Floor of one sample's share of an iteration, by the count of its operations at 790 TFLOP/s."""
COUNTS = (1, 2, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Cost:
    """Of one iteration: bytes that each GPU sends, seconds, and the fraction of the iteration."""

    sent_bytes: float
    seconds: float
    fraction: float


@dataclass(frozen=True)
class Link:
    """What connects neighbours in a ring: bytes a second in one direction, and seconds of one message."""

    bytes_per_s: float
    latency_s: float

    def all_reduce_s(self, size: float, count: int) -> float:
        """Seconds of a ring all-reduce of `size` bytes over `count`: 2(n − 1)/n of them, in 2(n − 1) messages."""
        return 0.0 if count == 1 else 2 * (count - 1) * (size / count / self.bytes_per_s + self.latency_s)


def all_reduce_s(size: float, gpus: int) -> float:
    """The same over the slowest link between so many GPUs."""
    bandwidth = NVLINK_BYTES_PER_S if gpus <= GPUS_PER_NODE else INFINIBAND_BYTES_PER_S
    return Link(bandwidth, STEP_LATENCY_S).all_reduce_s(size, gpus)


def iteration_cost(parameters: float, gpus: int, samples_per_gpu: int = SAMPLES_PER_GPU) -> Cost:
    """The gradient's sum. Scores and metrics are a few bytes a sample and are left out."""
    size = parameters * BYTES
    seconds = all_reduce_s(size, gpus)
    return Cost(2 * (gpus - 1) / gpus * size, seconds, seconds / (seconds + samples_per_gpu * SAMPLE_S))


def table() -> str:
    """Markdown."""
    rows = ["| GPUs | LoRA: sent by each | time | of an iteration | full: sent by each | time | of an iteration |",
            "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for gpus in COUNTS:
        cells = [str(gpus)]
        for parameters in (LORA_PARAMETERS, FULL_PARAMETERS):
            cost = iteration_cost(parameters, gpus)
            cells += [f"{cost.sent_bytes / 1e6:,.0f} MB", f"{cost.seconds * 1e3:.1f} ms", f"{cost.fraction:.2%}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
