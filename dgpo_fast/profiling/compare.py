"""Two profiles side by side, with the ratio of each row: on the terminal and as a page."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Literal

from rich.table import Table

from dgpo_fast.pages.document import document, row, table
from dgpo_fast.pages.marks import legend
from dgpo_fast.pages.units import digits, flop, gbytes, mebibytes, percent, seconds
from dgpo_fast.profiling import charts
from dgpo_fast.profiling.report import Report

Better = Literal["higher", "lower"] | None
EVEN = 0.02
"""Ratios this close to 1 count as equal."""
FULL_SWING = math.log(4)
"""The bars of the page are full at a ratio of 4 or 1/4."""

FOLDER_SETTINGS = ("name", "runs_dir")


@dataclass(frozen=True)
class Value:
    """One number of a report, how to write it, and which way is better."""

    number: float
    show: Callable[[float], str]
    better: Better


@dataclass(frozen=True)
class Row:
    """One number of both reports; None if a report is without it."""

    group: str
    name: str
    first: Value | None
    second: Value | None

    @property
    def ratio(self) -> float | None:
        """Second over first, if both are there and the first is not 0."""
        if self.first is None or self.second is None or not self.first.number:
            return None
        return self.second.number / self.first.number

    @property
    def verdict(self) -> Literal["better", "worse", ""]:
        """Whether the second is better; "" if they are equal, or if neither direction is better."""
        value, ratio = self.first or self.second, self.ratio
        if value is None or value.better is None or ratio is None or abs(ratio - 1) < EVEN:
            return ""
        return "better" if (ratio > 1) == (value.better == "higher") else "worse"


def compare(first: Report, second: Report) -> list[Row]:
    """Every number that either report has, group by group."""
    left, right = dict(_values(first)), dict(_values(second))
    groups = dict.fromkeys(group for group, _ in [*left, *right])
    keys = [key for group in groups for key in dict.fromkeys([*left, *right]) if key[0] == group]
    return [Row(group, name, left.get((group, name)), right.get((group, name))) for group, name in keys]


def _values(report: Report) -> Iterator[tuple[tuple[str, str], Value]]:
    yield from _speed(report)
    for phase in report.phases:
        yield ("seconds per phase", phase.name), Value(phase.times.median_s, seconds, "lower")
    for work in report.work:
        yield ("time by kind of work", work.name), Value(work.seconds, seconds, "lower")
    for work in report.work:
        yield ("rate by kind of work", work.name), Value(work.tflops, _rate, "higher")
    yield from _memory(report)
    yield from _gpu(report)
    yield from _power(report)
    yield ("device", "matmul rate"), Value(report.device.matmul_tflops, _rate, None)
    yield ("device", "copy bandwidth"), Value(report.device.copy_gb_per_s, _bandwidth, None)


def _speed(report: Report) -> Iterator[tuple[tuple[str, str], Value]]:
    speed = report.throughput
    yield ("speed", "iteration"), Value(speed.iteration.median_s, seconds, "lower")
    yield ("speed", "images/s"), Value(speed.images_per_s, digits, "higher")
    yield ("speed", "images an iteration"), Value(speed.images, digits, None)
    yield ("speed", "useful FLOP an iteration"), Value(speed.tflop_per_iteration, flop, None)
    if speed.executed_tflop is not None:
        yield ("speed", "executed FLOP an iteration"), Value(speed.executed_tflop, flop, "lower")
    yield ("speed", "achieved"), Value(speed.achieved_tflops, _rate, "higher")
    yield ("speed", "of the measured matmul rate"), Value(speed.of_matmul_percent, percent, "higher")
    if speed.mfu_percent is not None:
        yield ("speed", "MFU, of the datasheet"), Value(speed.mfu_percent, percent, "higher")
    if report.rewards:
        yield ("speed", "rewards, waited for"), Value(report.rewards.wait_s, seconds, "lower")
        yield ("speed", "rewards, hidden"), Value(report.rewards.hidden_s, seconds, None)


def _memory(report: Report) -> Iterator[tuple[tuple[str, str], Value]]:
    yield ("memory", "peak"), Value(report.memory.peak_mib, mebibytes, "lower")
    for phase in report.phases:
        if phase.peak_memory_mib:
            yield ("memory", f"peak in {phase.name}"), Value(phase.peak_memory_mib, mebibytes, "lower")
    for name, mib in report.memory.held_mib.items():
        yield ("memory", name), Value(mib, mebibytes, "lower")


def _gpu(report: Report) -> Iterator[tuple[tuple[str, str], Value]]:
    gpu = report.gpu
    if gpu is None:
        return
    yield ("GPU", "busy"), Value(gpu.busy_percent, percent, "higher")
    yield ("GPU", "idle"), Value(gpu.idle_ms / 1e3, seconds, "lower")
    for name in ("kernels", "kernel_launches", "graph_launches", "synchronisations"):
        yield ("GPU", name.replace("_", " ")), Value(getattr(gpu, name), digits, "lower")


def _power(report: Report) -> Iterator[tuple[tuple[str, str], Value]]:
    power = report.power
    if power is None:
        return
    yield ("power", "energy an image"), Value(power.energy_per_image_j, _joule, "lower")
    yield ("power", "mean power"), Value(power.mean_w, _watt, None)
    yield ("power", "SM clock, median"), Value(power.sm_clock_median_mhz, _megahertz, None)


def differences(first: Report, second: Report) -> list[tuple[str, str, str]]:
    """Settings and versions that are not the same: name, in the first, in the second."""
    left = {**first.settings, **first.versions, "device": first.device.name, "dtype": first.device.dtype}
    right = {**second.settings, **second.versions, "device": second.device.name, "dtype": second.device.dtype}
    names = [name for name in dict.fromkeys([*left, *right]) if name not in FOLDER_SETTINGS]
    return [(n, str(left.get(n, "–")), str(right.get(n, "–"))) for n in names if left.get(n) != right.get(n)]


def console_table(first: Report, second: Report, names: tuple[str, str]) -> Table:
    """The comparison for a terminal."""
    result = Table("", *names, "ratio", title="second over first", title_justify="left")
    for column in result.columns[1:]:
        column.justify = "right"
    group = None
    for line in compare(first, second):
        if line.group != group:
            result.add_section()
            result.add_row(line.group, style="bold")
            group = line.group
        style = {"better": "green", "worse": "red", "": ""}[line.verdict]
        ratio = "" if line.ratio is None else f"{digits(line.ratio)}×"
        result.add_row(f"  {line.name}", _shown(line.first), _shown(line.second), f"{ratio}", style=style or None)
    return result


def comparison_page(first: Report, second: Report, names: tuple[str, str]) -> str:
    """The comparison as a page of its own."""
    speed = second.throughput.images_per_s / first.throughput.images_per_s
    lead = (
        f"{names[1]} makes {digits(speed)} times the images per second of {names[0]}: "
        f"{digits(second.throughput.images_per_s)} against {digits(first.throughput.images_per_s)}."
    )
    rows: list[str] = []
    group = None
    for line in compare(first, second):
        if line.group != group:
            rows.append(f'<tr class="group"><td colspan="4">{escape(line.group)}</td></tr>')
            group = line.group
        rows.append(row(escape(line.name), _ratio(line), escape(_shown(line.first)), escape(_shown(line.second))))
    bars = "".join(
        f"<h3>{escape(name)}</h3>{charts.stacked(report, _share_of_longer(report, first, second))}"
        for name, report in zip(names, (first, second), strict=True)
    )
    phases = dict.fromkeys(phase.name for report in (first, second) for phase in report.phases)
    unlike = [row(escape(name), escape(a), escape(b)) for name, a, b in differences(first, second)]
    body = (
        f'<header><h1>{escape(names[0])} and {escape(names[1])}</h1><p class="soft">{escape(first.device.name)}'
        f"{'' if first.device.name == second.device.name else f' · {escape(second.device.name)}'}</p></header><main>"
        f'<section class="lead"><p>{escape(lead)}</p></section>'
        f"<section><h2>One iteration, on one scale</h2>{bars}{legend(phases)}</section>"
        f'<section><h2>Every number</h2><p class="soft">The ratio is the second over the first.</p>'
        f"{table(('', *names, 'ratio'), rows, 'All numbers of both profiles')}</section>"
        f"<section><h2>What differs in settings and versions</h2>{table(('', *names), unlike, 'Differences')}</section>"
        "</main><footer></footer>"
    )
    return document(f"{names[0]} and {names[1]}", body)


def _share_of_longer(report: Report, *both: Report) -> float:
    return report.throughput.iteration.median_s / max(each.throughput.iteration.median_s for each in both)


def _ratio(line: Row) -> str:
    if line.ratio is None:
        return ""
    swing = max(-1.0, min(1.0, math.log(line.ratio) / FULL_SWING)) if line.ratio > 0 else -1.0
    place = f"left:{50 + 50 * min(0.0, swing):.2f}%;width:{50 * abs(swing):.2f}%"
    bar = f'<span class="swing" aria-hidden="true"><i style="{place}"></i></span>'
    return f'<span class="{line.verdict}">{digits(line.ratio)}×{bar}</span>'


def _shown(value: Value | None) -> str:
    return "–" if value is None else value.show(value.number)


def _rate(value: float) -> str:
    return flop(value, per_second=True)


def _bandwidth(value: float) -> str:
    return gbytes(value, per_second=True)


def _joule(value: float) -> str:
    return f"{digits(value)} J"


def _watt(value: float) -> str:
    return f"{digits(value)} W"


def _megahertz(value: float) -> str:
    return f"{digits(value)} MHz"
