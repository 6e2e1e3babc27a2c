"""What processes tell one another in an iteration, on paper, from 1 to 1,024 GPUs.

    python benchmarks/scaling.py            prints the tables that docs/scaling.md shows

Nothing here is measured. With whole weights the gradient is summed once an iteration, after the last micro-batch, so
that nothing hides it: the times are added to the iteration's. With sharded weights every forward and backward gathers
the weights block by block, and every backward scatters the gradients, while the block before is computed: what is below
the computing time of an iteration can be hidden.
"""

from dataclasses import dataclass

LORA_PARAMETERS = 37.6e6
FULL_PARAMETERS = 2.243e9
"""Of SD3.5-Medium: a LoRA of rank 64 on the attention, and the whole transformer, counted from its definition."""
BYTES = 4
"""Gradients are summed in fp32."""
NVLINK_BYTES_PER_S = 450e9
"""NVLink 4 in one direction: half of the 900 GB/s at https://www.nvidia.com/en-us/data-center/h200/."""
INFINIBAND_BYTES_PER_S = 50e9
"""NDR InfiniBand, 400 Gb/s, one adapter a GPU: https://docs.nvidia.com/dgx/dgxh100-user-guide/."""
STEP_LATENCY_S = 5e-6
"""Of one message of the ring, assumed."""
GPUS_PER_NODE = 8
SAMPLES_PER_GPU = 16
SAMPLE_S = 0.1073
"""Floor of one sample's share of an iteration, by the count of its operations at 790 TFLOP/s."""
COUNTS = (1, 2, 8, 16, 64, 256, 1024)
BLOCKS = 24
"""What is gathered at a time."""
ROLLOUT_STEPS, TIMESTEPS, BATCH_SIZE = 10, 4, 32
"""Of the recipes for SD3.5-Medium: steps of a rollout, training timesteps, samples of a forward without gradient."""


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
        return 2 * self.gather_s(size, count)

    def gather_s(self, size: float, count: int, messages: int = 1) -> float:
        """Seconds in which `count` that hold a part each gather `size` bytes, or scatter their sums, in so many goes:
        (n − 1)/n of them in n − 1 messages."""
        return (count - 1) * (size / count / self.bytes_per_s + messages * self.latency_s)


NVLINK = Link(NVLINK_BYTES_PER_S, STEP_LATENCY_S)
INFINIBAND = Link(INFINIBAND_BYTES_PER_S, STEP_LATENCY_S)


def all_reduce_s(size: float, gpus: int) -> float:
    """The same over the slowest link between so many GPUs."""
    return slowest(gpus).all_reduce_s(size, gpus)


def slowest(gpus: int) -> Link:
    """NVLink inside a node, InfiniBand beyond it."""
    return NVLINK if gpus <= GPUS_PER_NODE else INFINIBAND


def iteration_cost(parameters: float, gpus: int, samples_per_gpu: int = SAMPLES_PER_GPU) -> Cost:
    """The gradient's sum. Scores and metrics are a few bytes a sample and are left out."""
    size = parameters * BYTES
    seconds = all_reduce_s(size, gpus)
    return Cost(2 * (gpus - 1) / gpus * size, seconds, seconds / (seconds + samples_per_gpu * SAMPLE_S))


def passes(samples: int = SAMPLES_PER_GPU) -> tuple[int, int]:
    """Gatherings of all weights in an iteration of one micro-batch, and scatterings of all gradients.

    Forwards of the rollout, of reference and θ_old at all timesteps, and of the policy, whose backward gathers again.
    """
    rollout = ROLLOUT_STEPS * -(-samples // BATCH_SIZE)
    frozen = 2 * -(-TIMESTEPS * samples // BATCH_SIZE)
    return rollout + frozen + 2 * TIMESTEPS, TIMESTEPS


def sharded_s(gpus: int, hybrid: bool) -> float:
    """Seconds of an iteration's gatherings and scatterings of all of SD3.5-Medium's weights, in fp32.

    Args:
        gpus: of them all.
        hybrid: shards inside a node, and the gradient's shards summed over the nodes in every backward.
    """
    size, (gathered, scattered) = FULL_PARAMETERS * BYTES, passes()
    inside = min(gpus, GPUS_PER_NODE) if hybrid else gpus
    link = slowest(inside)
    seconds = (gathered + scattered) * link.gather_s(size, inside, BLOCKS)
    if hybrid:
        seconds += scattered * INFINIBAND.all_reduce_s(size / inside, gpus // inside)
    return seconds


def sharded_table() -> str:
    """Markdown."""
    computing_s = SAMPLES_PER_GPU * SAMPLE_S
    rows = [
        "| GPUs | full: time | of the computing | hybrid: time | of the computing |",
        "| --- | --- | --- | --- | --- |",
    ]
    for gpus in COUNTS[2:]:
        times = [sharded_s(gpus, hybrid) for hybrid in (False, True)]
        cells = [cell for seconds in times for cell in (f"{seconds:.2f} s", f"{seconds / computing_s:.0%}")]
        rows.append(f"| {gpus} | {' | '.join(cells)} |")
    return "\n".join(rows)


def table() -> str:
    """Markdown."""
    rows = [
        "| GPUs | LoRA: sent by each | time | of an iteration | full: sent by each | time | of an iteration |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpus in COUNTS:
        cells = [str(gpus)]
        for parameters in (LORA_PARAMETERS, FULL_PARAMETERS):
            cost = iteration_cost(parameters, gpus)
            cells += [f"{cost.sent_bytes / 1e6:,.0f} MB", f"{cost.seconds * 1e3:.1f} ms", f"{cost.fraction:.2%}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(), sharded_table(), sep="\n\n")
