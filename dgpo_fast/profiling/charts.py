"""Charts as HTML and SVG that need nothing else: bars and marks are placed in per cent, so they fit any width.

Every mark carries its numbers in `data-tip`; the page's script shows them on hover and on focus.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from dgpo_fast.models.work import BACKWARD, PARTS_OF_TRAINING
from dgpo_fast.pages.marks import axis_labels, chart, colour, labelled, line, mark, pc, plot, ticks
from dgpo_fast.pages.units import digits, flop, gbytes, mebibytes, percent, seconds, short
from dgpo_fast.profiling.report import Iteration, Report, Span

MARGIN_DECADES = 0.3


def stacked(report: Report, width: float = 1.0) -> str:
    """The median iteration as one bar over `width` of the page, with the parts of the training phase under it."""
    order = [phase for phase in report.phases if phase.share_percent > 0]
    total = sum(phase.share_percent for phase in order)
    outer, inner = [], []
    for phase in order:
        share = phase.share_percent / total
        tip = f"{phase.name}: {seconds(phase.times.median_s)}, {percent(phase.share_percent)} of the iteration"
        outer.append(labelled(phase.name, share * width, tip, share))
        inner.append(
            _parts_of_training(report, share, width)
            if phase.name == "train"
            else f'<i class="none" style="width:{pc(share)}"></i>'
        )
    bars = f'<div class="stack">{"".join(outer)}</div><div class="stack inner">{"".join(inner)}</div>'
    body = bars if width == 1 else f'<div style="width:{pc(width)}">{bars}</div>'
    return chart("Seconds per phase of the median iteration", body)


def _parts_of_training(report: Report, share: float, width: float) -> str:
    parts = [work for work in report.work if work.name in PARTS_OF_TRAINING]
    total = sum(work.seconds for work in parts)
    marks = []
    for work in parts:
        mine = share * work.seconds / total
        tip = f"{_called(work.name)}, a part of train: {seconds(work.seconds)}"
        marks.append(labelled(work.name, mine * width, tip, mine))
    return "".join(marks)


def timeline(iterations: Sequence[Iteration]) -> str:
    """Every measured iteration as a row: phases, and the forwards inside the training phase below them."""
    longest = max(iteration.seconds for iteration in iterations)
    rows = []
    for index, iteration in enumerate(iterations, 1):
        outer = "".join(_span(span, index, longest) for span in iteration.spans if span.inside is None)
        inner = "".join(_span(span, index, longest) for span in iteration.spans if span.inside is not None)
        rows.append(
            f'<span class="label">{index}</span><div><div class="track">{outer}</div>'
            f'<div class="track inner">{inner}</div></div>'
        )
    axis = f'<span></span><div class="ticks">{axis_labels([(t / longest, seconds(t)) for t in ticks(longest)])}</div>'
    return chart("Timeline of the measured iterations", f'<div class="gantt">{"".join(rows)}{axis}</div>')


def _span(span: Span, iteration: int, longest: float) -> str:
    where = f"iteration {iteration}" + (f", inside {span.inside}" if span.inside else "")
    tip = f"{span.name} ({where})\n{seconds(span.end_s - span.start_s)}, from {seconds(span.start_s)}"
    place = f"left:{pc(span.start_s / longest)};width:{pc((span.end_s - span.start_s) / longest)}"
    return mark("i", f"{place};{colour(span.name)}", tip)


def memory(report: Report) -> str:
    """Memory over the measured iterations, over bands that show the phases."""
    first, last = report.iterations[0], report.iterations[-1]
    end = last.start_s + last.seconds - first.start_s
    peaks = {phase.name: phase.peak_memory_mib for phase in report.phases}
    bands = []
    for index, iteration in enumerate(report.iterations, 1):
        for span in iteration.spans:
            if span.inside is None:
                peak = peaks.get(span.name)
                tip = f"{span.name}, iteration {index}"
                tip += f"\npeak over all iterations: {mebibytes(peak)}" if peak else ""
                start = (iteration.start_s + span.start_s) / end
                place = f"left:{pc(start)};width:{pc((span.end_s - span.start_s) / end)};{colour(span.name)}"
                bands.append(mark("i", place, tip, classes="band"))
    most = 1.05 * report.memory.peak_mib
    base = 1024.0 if most >= 1024 else 1.0
    return _curve("Memory over time", report.memory.samples, end, most, mebibytes, "".join(bands), base=base)


def over_time(label: str, samples: list[tuple[float, float]], unit: str) -> str:
    """A curve of samples (seconds, value) from zero up."""
    most = max(value for _, value in samples) * 1.1 or 1.0
    return _curve(label, samples, samples[-1][0], most, lambda value: f"{digits(value)} {unit}", classes="low")


def _curve(
    label: str,
    samples: list[tuple[float, float]],
    end_s: float,
    most: float,
    show: Callable[[float], str],
    over: str = "",
    classes: str = "",
    base: float = 1.0,
) -> str:
    levels = [(level * base / most, show(level * base)) for level in ticks(most / base, 4)]
    across = [(t / end_s, seconds(t)) for t in ticks(end_s)]
    return plot(label, line([(t / end_s, value / most) for t, value in samples]) + over, levels, across, classes)


def roofline(report: Report) -> str:
    """Arithmetic intensity and achieved rate of each kind of work under the measured roofs, both logarithmic."""
    device = report.device
    points = [(work.flop_per_byte, work.tflops) for work in report.work]
    points += [(row.tflop / row.gbytes * 1e3, row.tflops) for row in report.operations if row.tflop and row.gbytes]
    ridge = device.matmul_tflops / device.copy_gb_per_s * 1e3
    top = max([device.matmul_tflops, device.datasheet_tflops or 0.0, *(y for _, y in points)])
    x = _LogScale([*(x for x, _ in points), ridge])
    y = _LogScale([*(y for _, y in points), top])
    marks = "".join(_roofline_marks(report, x, y))
    slope_x = max(x.low, y.low / device.copy_gb_per_s * 1e3)
    lines = [
        _line(x(slope_x), y(slope_x * device.copy_gb_per_s / 1e3), x(ridge), y(device.matmul_tflops)),
        _line(x(ridge), y(device.matmul_tflops), 1, y(device.matmul_tflops)),
    ]
    notes = [_note("right:4px", y(device.matmul_tflops), f"measured matmul {flop(device.matmul_tflops, True)}")]
    if device.datasheet_tflops:
        lines.append(_line(x(ridge), y(device.datasheet_tflops), 1, y(device.datasheet_tflops), dashed=True))
        notes.append(_note("right:4px", y(device.datasheet_tflops), f"datasheet {flop(device.datasheet_tflops, True)}"))
    notes.append(
        f'<span class="note" style="left:8px;top:6px">copy {gbytes(device.copy_gb_per_s, True)} (slope)</span>'
    )
    factor, unit = (1.0, "TFLOP/s") if top >= 1 else (1e3, "GFLOP/s")
    grid = "".join(f'<i class="rule" style="top:{pc(1 - y(tick))}"></i>' for tick in y.decades)
    grid += "".join(f'<i class="fall" style="left:{pc(x(tick))}"></i>' for tick in x.decades)
    labels = "".join(f'<span style="top:{pc(1 - y(t))}">{escape(short(digits(t * factor)))}</span>' for t in y.decades)
    axis = axis_labels([(x(tick), digits(tick)) for tick in x.decades])
    return chart(
        "Roofline",
        f'<div class="plot"><div class="scale">{labels}</div><div class="canvas tall">{grid}'
        f'<svg aria-hidden="true">{"".join(lines)}</svg>{"".join(notes)}{marks}</div>'
        f'<span></span><div class="ticks">{axis}</div>'
        f'<span></span><div class="axis">{unit}, over FLOP per byte of inputs and outputs</div></div>',
    )


def _roofline_marks(report: Report, x: "_LogScale", y: "_LogScale") -> Iterable[str]:
    for number, work in enumerate(report.work, 1):
        tip = (
            f"{number} {_called(work.name)}\n{flop(work.tflops, True)}, {percent(work.of_matmul_percent)} of matmul\n"
            f"{digits(work.flop_per_byte)} FLOP per byte"
        )
        place = f"left:{pc(x(work.flop_per_byte))};top:{pc(1 - y(work.tflops))};{colour(work.name)}"
        yield mark("i", place, tip, str(number), "point")
    for row in report.operations:
        if row.tflop and row.gbytes:
            intensity = row.tflop / row.gbytes * 1e3
            tip = f"all {row.kind}\n{flop(row.tflops, True)}\n{digits(intensity)} FLOP per byte (traced iteration)"
            place = f"left:{pc(x(intensity))};top:{pc(1 - y(row.tflops))};{colour(row.kind)}"
            yield mark("i", place, tip, row.kind[0].upper(), "point square")


def roofline_legend(report: Report) -> str:
    """What the numbers and letters of the roofline mean."""
    names = [(str(number), work.name, "") for number, work in enumerate(report.work, 1)]
    names += [(row.kind[0].upper(), f"all {row.kind}", row.kind) for row in report.operations if row.tflop]
    items = (
        f'<li><span class="chip" style="{colour(kind or name)}"></span>{label} {escape(name)}</li>'
        for label, name, kind in names
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


class _LogScale:
    """Maps values to [0, 1] by their logarithm, with some room at both ends."""

    def __init__(self, values: Sequence[float]):
        logs = [math.log10(value) for value in values if value > 0]
        self._low, self._high = min(logs) - MARGIN_DECADES, max(logs) + MARGIN_DECADES

    @property
    def low(self) -> float:
        return 10**self._low

    @property
    def decades(self) -> list[float]:
        """Powers of ten, and on a short scale 2 and 5 times them, within the scale."""
        factors = (1, 2, 5) if self._high - self._low < 2.2 else (1,)
        exponents = range(math.floor(self._low), math.ceil(self._high) + 1)
        values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        return [value for value in values if self._low <= math.log10(value) <= self._high]

    def __call__(self, value: float) -> float:
        return (math.log10(value) - self._low) / (self._high - self._low)


def _line(x0: float, y0: float, x1: float, y1: float, dashed: bool = False) -> str:
    ends = f'x1="{pc(x0)}" y1="{pc(1 - y0)}" x2="{pc(x1)}" y2="{pc(1 - y1)}"'
    return f'<line class="roof{" dashed" if dashed else ""}" {ends}/>'


def _note(side: str, height: float, text: str) -> str:
    return f'<span class="note" style="{side};top:calc({pc(1 - height)} - 20px)">{escape(text)}</span>'


def _called(name: str) -> str:
    return "backward, loss and noise" if name == BACKWARD else name
