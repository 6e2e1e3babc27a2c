"""Where the time went, in sentences that are computed from a report."""

from dgpo_fast.models.work import BACKWARD
from dgpo_fast.pages.units import digits, flop, mebibytes, percent, seconds, short
from dgpo_fast.profiling.report import Report

NEGLIGIBLE_PERCENT = 1.0


def sentences(report: Report) -> list[str]:
    """The report in a few sentences, the most important first. What was not measured has none."""
    lines = [
        _speed(report),
        _phases(report),
        _processes(report),
        _compute(report),
        _loss(report),
        _gpu(report),
        _rewards(report),
        _memory(report),
        _power(report),
    ]
    return [line for line in lines if line]


def _speed(report: Report) -> str:
    speed = report.throughput
    return (
        f"An iteration of {speed.images} images takes {seconds(speed.iteration.median_s)}: "
        f"{digits(speed.images_per_s)} images/s."
    )


def _phases(report: Report) -> str:
    ranked = sorted(report.phases, key=lambda phase: -phase.share_percent)
    named = [phase for phase in ranked if phase.share_percent >= NEGLIGIBLE_PERCENT]
    parts = [
        f"{percent(phase.share_percent)} {'outside any phase' if phase.name == 'other' else phase.name}"
        for phase in named
    ]
    return f"Of that, {_listed(parts)}."


def _processes(report: Report) -> str:
    if report.processes is None:
        return ""
    rows = report.processes.rows
    return (
        f"Of {len(rows)} processes the slowest worked {digits(report.processes.imbalance)} times as long as the mean; "
        f"they waited {seconds(sum(process.waited_s for process in rows) / len(rows))} for one another on average."
    )


def _compute(report: Report) -> str:
    speed, device = report.throughput, report.device
    line = (
        f"Its {flop(speed.tflop_per_iteration)} run at {flop(speed.achieved_tflops, per_second=True)}: "
        f"{percent(speed.of_matmul_percent)} of the matmul rate measured in the same run "
        f"({flop(device.matmul_tflops, per_second=True)})"
    )
    if speed.mfu_percent is not None and device.datasheet_tflops is not None:
        line += (
            f", {percent(speed.mfu_percent)} of the datasheet's {flop(device.datasheet_tflops, per_second=True)} (MFU)"
        )
    return f"{line}."


def _loss(report: Report) -> str:
    """The kind of work that takes longest beyond what its FLOPs would take at the measured matmul rate."""
    losses = {work.name: work.seconds - work.tflop / report.device.matmul_tflops for work in report.work}
    if not losses or max(losses.values()) <= 0:
        return ""
    name = max(losses, key=lambda kind: losses[kind])
    called = "the backward pass (with loss and noise)" if name == BACKWARD else f"the {name}"
    return f"Most time to win is in {called}: {seconds(losses[name])} more than its FLOPs take at the matmul rate."


def _gpu(report: Report) -> str:
    if report.gpu is None:
        return ""
    longest = max(report.gpu.gaps, key=lambda gap: gap.total_ms)
    line = f"The GPU was busy {percent(report.gpu.busy_percent)} of the traced iteration"
    if not longest.total_ms:
        return f"{line}."
    length = (
        f"at least {short(seconds(longest.from_us / 1e6))}"
        if longest.to_us is None
        else (f"{short(seconds(longest.from_us / 1e6))} to {short(seconds(longest.to_us / 1e6))}")
    )
    return (
        f"{line}; of {seconds(report.gpu.idle_ms / 1e3)} idle, {seconds(longest.total_ms / 1e3)} lie in "
        f"{longest.count} gaps of {length}."
    )


def _rewards(report: Report) -> str:
    if report.rewards is None or not report.rewards.busy_s:
        return ""
    rewards = report.rewards
    return (
        f"Rewards took {seconds(rewards.busy_s)} of work; the training waited {seconds(rewards.wait_s)} for them, "
        f"{seconds(rewards.hidden_s)} were hidden behind other work."
    )


def _memory(report: Report) -> str:
    memory = report.memory
    phases = [phase for phase in report.phases if phase.peak_memory_mib]
    line = f"Memory ({memory.what}) peaked at {mebibytes(memory.peak_mib)} of {mebibytes(report.device.memory_mib)}"
    if phases:
        line += f", in {max(phases, key=lambda phase: phase.peak_memory_mib or 0).name}"
    if memory.predicted_mib is not None:
        line += f"; {mebibytes(memory.predicted_mib)} were predicted for its tensors"
    return f"{line}."


def _power(report: Report) -> str:
    power = report.power
    if power is None:
        return ""
    line = f"It drew {digits(power.mean_w)} W on average: {digits(power.energy_per_image_j)} J an image"
    held_back = [
        f"by its power cap {percent(power.power_capped_percent)}" if power.power_capped_percent else "",
        f"by heat {percent(power.heat_limited_percent)}" if power.heat_limited_percent else "",
    ]
    held_back = [part for part in held_back if part]
    return f"{line}; the clocks were held back {_listed(held_back)} of the time." if held_back else f"{line}."


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
