"""Charts as HTML and SVG that need nothing else: bars and marks are placed in per cent, so they fit any width.

Every mark carries its numbers in `data-tip`; the page's script shows them on hover and on focus.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from dgpo_fast.models.work import BACKWARD, BOTH, DECODE, OLD, PARTS_OF_TRAINING, POLICY, REFERENCE, ROLLOUT
from dgpo_fast.profiling.report import Iteration, Report, Span
from dgpo_fast.profiling.units import digits, flop, gbytes, mebibytes, percent, seconds, short

COLOURS = {
    "encode": "encode",
    ROLLOUT: "rollout",
    BOTH: "rollout",
    DECODE: "decode",
    "reward": "reward",
    "train": "train",
    "optimizer": "optimizer",
    REFERENCE: "reference",
    OLD: "old",
    POLICY: "policy",
    BACKWARD: "backward",
    "matmul": "matmul",
    "attention": "attention",
    "convolution": "convolution",
}
MARGIN_DECADES = 0.3
# The charts' width on a wide page and on the narrowest, and that of a letter in them.
WIDE_PX, NARROW_PX, LETTER_PX = 1000, 330, 7.5


def colour(name: str) -> str:
    """The style that gives a mark the colour of a phase, a kind of work or a class of operation."""
    return f"--c:var(--{COLOURS.get(name, 'other')})"


def mark(kind: str, style: str, tip: str, text: str = "", classes: str = "") -> str:
    """One mark of a chart: an element `kind` that says `tip` to a pointer, a keyboard and a screen reader."""
    css = f' class="{classes}"' if classes else ""
    spoken = escape(tip.replace("\n", ", "))
    said = f'role="img" aria-label="{spoken}" data-tip="{escape(tip)}"'
    return f'<{kind}{css} {said} style="{style}">{escape(text)}</{kind}>'


def chart(label: str, body: str) -> str:
    """The frame of a chart: one stop for the keyboard, named for a screen reader."""
    return f'<div class="chart" role="group" aria-label="{escape(label)}; arrow keys move between marks">{body}</div>'


def legend(names: Iterable[str]) -> str:
    """What the colours mean."""
    items = (f'<li><span class="chip" style="{colour(name)}"></span>{escape(name)}</li>' for name in names)
    return f'<ul class="legend">{"".join(items)}</ul>'


def bar(share: float, name: str = "") -> str:
    """A small bar inside a table: `share` in [0, 1]."""
    return f'<span class="bar" style="{colour(name) if name else ""}"><i style="width:{_pc(share)}"></i></span>'


def ticks(most: float, count: int = 5) -> list[float]:
    """Round numbers from 0 up to at most `most`."""
    if most <= 0:
        return [0.0]
    rough = most / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [index * step for index in range(int(most / step * (1 + 1e-9)) + 1)]


def stacked(report: Report, width: float = 1.0) -> str:
    """The median iteration as one bar over `width` of the page, with the parts of the training phase under it."""
    order = [phase for phase in report.phases if phase.share_percent > 0]
    total = sum(phase.share_percent for phase in order)
    outer, inner = [], []
    for phase in order:
        share = phase.share_percent / total
        tip = f"{phase.name}: {seconds(phase.times.median_s)}, {percent(phase.share_percent)} of the iteration"
        outer.append(_labelled(phase.name, share * width, tip, share))
        inner.append(
            _parts_of_training(report, share, width)
            if phase.name == "train"
            else f'<i class="none" style="width:{_pc(share)}"></i>'
        )
    bars = f'<div class="stack">{"".join(outer)}</div><div class="stack inner">{"".join(inner)}</div>'
    body = bars if width == 1 else f'<div style="width:{_pc(width)}">{bars}</div>'
    return chart("Seconds per phase of the median iteration", body)


def _parts_of_training(report: Report, share: float, width: float) -> str:
    parts = [work for work in report.work if work.name in PARTS_OF_TRAINING]
    total = sum(work.seconds for work in parts)
    marks = []
    for work in parts:
        mine = share * work.seconds / total
        tip = f"{_called(work.name)}, a part of train: {seconds(work.seconds)}"
        marks.append(_labelled(work.name, mine * width, tip, mine))
    return "".join(marks)


def _labelled(name: str, of_page: float, tip: str, share: float) -> str:
    """A piece of a stacked bar, with its name in it if there is room: on any page, on a wide one, or on none."""
    need = LETTER_PX * len(name) + 8
    text = name if of_page * WIDE_PX > need else ""
    narrow = of_page * NARROW_PX > need
    return mark("i", f"width:{_pc(share)};{colour(name)}", tip, text, "" if narrow else "wide")


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
    axis = f'<span></span><div class="ticks">{_axis_labels([(t / longest, seconds(t)) for t in ticks(longest)])}</div>'
    return chart("Timeline of the measured iterations", f'<div class="gantt">{"".join(rows)}{axis}</div>')


def _span(span: Span, iteration: int, longest: float) -> str:
    where = f"iteration {iteration}" + (f", inside {span.inside}" if span.inside else "")
    tip = f"{span.name} ({where})\n{seconds(span.end_s - span.start_s)}, from {seconds(span.start_s)}"
    place = f"left:{_pc(span.start_s / longest)};width:{_pc((span.end_s - span.start_s) / longest)}"
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
                place = f"left:{_pc(start)};width:{_pc((span.end_s - span.start_s) / end)};{colour(span.name)}"
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
    points = " ".join(f"{100 * t / end_s:.2f},{100 * (1 - value / most):.2f}" for t, value in samples)
    levels = [level * base for level in ticks(most / base, 4)]
    rules = "".join(f'<i class="rule" style="top:{_pc(1 - level / most)}"></i>' for level in levels[1:])
    labels = "".join(
        f'<span style="top:{_pc(1 - level / most)}">{escape(short(show(level)))}</span>' for level in levels
    )
    axis = _axis_labels([(t / end_s, seconds(t)) for t in ticks(end_s)])
    frame = 'viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"'
    curve = f'<svg {frame}><polyline class="curve" points="{points}"/></svg>'
    return chart(
        label,
        f'<div class="plot"><div class="scale">{labels}</div><div class="canvas {classes}">{rules}{curve}{over}</div>'
        f'<span></span><div class="ticks">{axis}</div></div>',
    )


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
    grid = "".join(f'<i class="rule" style="top:{_pc(1 - y(tick))}"></i>' for tick in y.decades)
    grid += "".join(f'<i class="fall" style="left:{_pc(x(tick))}"></i>' for tick in x.decades)
    labels = "".join(f'<span style="top:{_pc(1 - y(t))}">{escape(short(digits(t * factor)))}</span>' for t in y.decades)
    axis = _axis_labels([(x(tick), digits(tick)) for tick in x.decades])
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
        place = f"left:{_pc(x(work.flop_per_byte))};top:{_pc(1 - y(work.tflops))};{colour(work.name)}"
        yield mark("i", place, tip, str(number), "point")
    for row in report.operations:
        if row.tflop and row.gbytes:
            intensity = row.tflop / row.gbytes * 1e3
            tip = f"all {row.kind}\n{flop(row.tflops, True)}\n{digits(intensity)} FLOP per byte (traced iteration)"
            place = f"left:{_pc(x(intensity))};top:{_pc(1 - y(row.tflops))};{colour(row.kind)}"
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
    ends = f'x1="{_pc(x0)}" y1="{_pc(1 - y0)}" x2="{_pc(x1)}" y2="{_pc(1 - y1)}"'
    return f'<line class="roof{" dashed" if dashed else ""}" {ends}/>'


def _note(side: str, height: float, text: str) -> str:
    return f'<span class="note" style="{side};top:calc({_pc(1 - height)} - 20px)">{escape(text)}</span>'


def _axis_labels(labels: list[tuple[float, str]]) -> str:
    return "".join(f'<span style="left:{_pc(place)}">{escape(short(text))}</span>' for place, text in labels)


def _called(name: str) -> str:
    return "backward, loss and noise" if name == BACKWARD else name


def _pc(share: float) -> str:
    return f"{100 * share:.3f}%"
