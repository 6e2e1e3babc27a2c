"""Parts of charts as HTML and SVG that need nothing else: they are placed in per cent, so they fit any width.

Every mark carries its numbers in `data-tip`; the page's script shows them on hover and on focus.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from dgpo_fast.models.work import BACKWARD, BOTH, DECODE, OLD, POLICY, REFERENCE, ROLLOUT
from dgpo_fast.pages.units import short

Labels = Sequence[tuple[float, str]]
"""Of an axis: where, as a share of its length, and what."""
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
# The charts' width on a wide page and on the narrowest, and that of a letter in them.
WIDE_PX, NARROW_PX, LETTER_PX = 1000, 330, 7.5


def pc(share: float) -> str:
    """A share, in [0, 1], as CSS has it."""
    return f"{100 * share:.3f}%"


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


def chip(name: str) -> str:
    """A name with the colour that it has in the charts."""
    return f'<span class="chip" style="{colour(name)}"></span>{escape(name)}'


def legend(names: Iterable[str]) -> str:
    """What the colours mean."""
    return key({name: COLOURS.get(name, "other") for name in names})


def key(colours: Mapping[str, str]) -> str:
    """What colours mean: the style's name of each by what it stands for."""
    items = (
        f'<li><span class="chip" style="--c:var(--{css})"></span>{escape(name)}</li>' for name, css in colours.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def bar(share: float, name: str = "") -> str:
    """A small bar inside a table: `share` in [0, 1]."""
    return f'<span class="bar" style="{colour(name) if name else ""}"><i style="width:{pc(share)}"></i></span>'


def ticks(most: float, count: int = 5, least: float = 0.0) -> list[float]:
    """Round numbers from `least` up to at most `most`, about `count` of them."""
    if most <= least:
        return [least]
    rough = (most - least) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    # Rounding must not lose a number at an end.
    first, last = math.ceil(least / step - 1e-9), math.floor(most / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


class Scale:
    """Maps values to shares of a plot's height, with some room at both ends.

    Args:
        values: those that are shown; at least one is finite.
    """

    def __init__(self, values: Iterable[float]):
        known = [value for value in values if math.isfinite(value)]
        low, high = min(known), max(known)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.low, self.high = low - room, high + room

    def __call__(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def labels(self, show: Callable[[float], str]) -> list[tuple[float, str]]:
        """Round numbers for `plot`."""
        return [(self(value), show(value)) for value in ticks(self.high, 4, self.low)]


def labelled(name: str, of_page: float, tip: str, share: float) -> str:
    """A piece of a stacked bar, with its name in it if there is room: on any page, on a wide one, or on none."""
    need = LETTER_PX * len(name) + 8
    text = name if of_page * WIDE_PX > need else ""
    narrow = of_page * NARROW_PX > need
    return mark("i", f"width:{pc(share)};{colour(name)}", tip, text, "" if narrow else "wide")


def line(points: Iterable[tuple[float, float]], classes: str = "") -> str:
    """A line through `points`, as shares of a plot's width and height; its classes beside "curve"."""
    path = " ".join(f"{100 * x:.2f},{100 * (1 - y):.2f}" for x, y in points)
    frame = 'viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg {frame}><polyline class="{f"curve {classes}".strip()}" points="{path}"/></svg>'


def plot(label: str, content: str, levels: Labels, across: Labels, classes: str = "") -> str:
    """A chart with a scale on the left and one below.

    Args:
        label: what it shows.
        content: HTML, over the lines of the scale.
        levels: of the scale on the left, from the bottom up.
        across: of the scale below.
        classes: of the canvas.
    """
    rules = "".join(f'<i class="rule" style="top:{pc(1 - y)}"></i>' for y, _ in levels if y > 0)
    scale = "".join(f'<span style="top:{pc(1 - y)}">{escape(short(text))}</span>' for y, text in levels)
    return chart(
        label,
        f'<div class="plot"><div class="scale">{scale}</div><div class="canvas {classes}">{rules}{content}</div>'
        f'<span></span><div class="ticks">{axis_labels(across)}</div></div>',
    )


def axis_labels(labels: Labels) -> str:
    """The labels of a scale below a chart."""
    return "".join(f'<span style="left:{pc(x)}">{escape(short(text))}</span>' for x, text in labels)
