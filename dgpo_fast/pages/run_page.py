"""`index.html` in a run's folder: the run as it goes. Pictures are files beside it."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import flat
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.pages.document import document, links, pairs, row, sections, table, tiles
from dgpo_fast.pages.marks import Scale, bar, chart, chip, key, labelled, legend, line, mark, pc, plot, ticks
from dgpo_fast.pages.units import digits, percent, seconds
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.run.console import duration, score_cells
from dgpo_fast.run.pictures import pictures_of
from dgpo_fast.wording import FEWEST_PROMPTS, number

FILE = "index.html"
RELOAD_S = 10
SILENT_S = 300
"""Without a word for so long, a run may have ended without saying so."""
RECENT = 20
"""Iterations over which speeds are averaged."""
MOST_POINTS = 100
"""Of a curve: more iterations than that are averaged."""
LEARNING = {
    "loss": "Loss",
    "kl": "KL to the base model",
    "grad_norm": "Gradient norm",
    "clipped_fraction": "Share of clipped samples",
    "reward_std": "Spread of rewards",
    "peak_memory_mib": "Peak GPU memory, MiB",
}
"""Metrics with a chart of their own."""


class Score(NamedTuple):
    """A mean reward with its 95 % interval, after a number of iterations."""

    iteration: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RunView:
    """What the page shows.

    Attributes:
        folder: the run's.
        config: its settings.
        state: what it is doing, in a sentence.
        live: whether it still goes on.
        lines: the metrics of its iterations.
        evaluated: the prompts of its evaluations, as in "held-out prompts".
        before, after, gain: of `Evaluation`, once they are there.
        events: moments, seconds since 1970, and lines that the run has printed.
    """

    folder: Path
    config: Config
    state: str
    live: bool
    lines: Sequence[Metrics]
    evaluated: str = "held-out prompts"
    before: JsonObject | None = None
    after: JsonObject | None = None
    gain: JsonObject | None = None
    events: Sequence[tuple[float, str]] = ()

    @property
    def iteration(self) -> int:
        """The last one that is finished."""
        return self.lines[-1]["iteration"] if self.lines else 0

    @property
    def recent(self) -> Sequence[Metrics]:
        """The last iterations."""
        return self.lines[-RECENT:]

    def scores(self) -> list[Score]:
        """Of all evaluations."""
        found = [Score(0, *_ends(self.before))] if self.before else []
        found += [
            Score(one["iteration"], *_ends({key: one[f"heldout_{key}"] for key in ("reward_mean", "reward_ci95")}))
            for one in self.lines
            if _known(one.get("heldout_reward_mean"))
        ]
        return [*found, *([Score(self.iteration, *_ends(self.after))] if self.after else [])]

    def looks(self) -> list[Score]:
        """Of looks at fixed prompts."""
        return [
            Score(one["iteration"], *_ends({key: one[f"look/{key}"] for key in ("reward_mean", "reward_ci95")}))
            for one in self.lines
            if _known(one.get("look/reward_mean"))
        ]


def run_page(view: RunView) -> str:
    """The whole page."""
    parts = [
        ("reward", "Reward", _reward(view)),
        ("pictures", "Pictures", _pictures(view)),
        ("results", "Before and after", _results(view)),
        ("signs", "Signs of reward hacking", _signs(view)),
        ("time", "Where the time goes", _time(view)),
        ("learning", "Learning", _learning(view)),
        ("events", "Events", _events(view)),
        ("settings", "Settings", _settings(view)),
    ]
    config, title = view.config, view.folder.name
    about = (config.recipe, config.objective, config.model, " ".join(config.rewards))
    top = f'<header><h1>{escape(title)}</h1><p class="soft">{escape(" · ".join(about))}</p>{links(parts)}</header>'
    foot = f"<footer>Numbers: <code>metrics.jsonl</code>. Written at {_moment(time.time())}.</footer>"
    body = f"{top}<main>{_lead(view)}{_tiles(view)}{sections(parts)}</main>{foot}"
    return document(title, body, pictures=True, reload_s=RELOAD_S if view.live else None)


def _lead(view: RunView) -> str:
    live = '<span class="live"></span>' if view.live else ""
    lines = [f"<p>{live}{escape(view.state)}</p>"]
    scores = view.scores() or view.looks()
    if len(scores) > 1:
        first, last = scores[0], scores[-1]
        what = view.evaluated if view.scores() else "fixed prompts"
        lines.append(f"<p>The reward on {escape(what)} went from {number(first.mean)} to {number(last.mean)}.</p>")
    alarms: list[str] = next((one["look/alarms"] for one in reversed(view.lines) if "look/alarms" in one), [])
    if alarms:
        lines.append(f'<p class="worse">Signs of reward hacking: {escape(", ".join(map(str, alarms)))}.</p>')
    if view.live:
        after_s = SILENT_S + 3 * max((one["iteration_s"] for one in view.recent), default=0.0)
        since = f'data-since="{time.time():.0f}" data-after="{after_s:.0f}"'
        silent = "No word from the run for long: it may have ended."
        lines.append(f'<p id="silent" class="worse" hidden {since}>{silent}</p>')
    return f'<section class="lead" aria-label="Summary">{"".join(lines)}</section>'


def _tiles(view: RunView) -> str:
    shown = [(f"{view.iteration} of {view.config.iterations}", "iterations")]
    if view.lines:
        last = view.lines[-1]
        spent = sum(one["iteration_s"] for one in view.recent) / len(view.recent)
        shown.append((number(last["reward_mean"]) if _known(last.get("reward_mean")) else "–", "reward, last images"))
        shown.append((digits(sum(one["images_per_s"] for one in view.recent) / len(view.recent)), "images/s"))
        shown.append((seconds(spent), "an iteration"))
        if view.live and view.iteration < view.config.iterations:
            shown.append((duration(spent * (view.config.iterations - view.iteration)), "left"))
        shown.append((f"{sum(one['images_count'] for one in view.lines):,}", "images so far"))
    return tiles(shown)


def _reward(view: RunView) -> str:
    points, scores, looks = _points(view.lines, "reward_mean"), view.scores(), view.looks()
    values = [y for _, y in points] + [end for one in (*scores, *looks) for end in one[1:]]
    if not any(map(math.isfinite, values)):
        return ""
    scale, end = Scale(values), max(view.iteration, 1)
    content = _curve(points, scale, end, "reward of training images", "soft")
    colours = {"training images": "soft"} if points else {}
    for what, some, css in ((view.evaluated, scores, "accent"), ("fixed prompts", looks, "reward")):
        known = [one for one in some if math.isfinite(one.mean)]
        content += line([(one.iteration / end, scale(one.mean)) for one in known], css) if known else ""
        content += "".join(_interval(one, scale, end, what, css) for one in known)
        colours |= {what: css} if known else {}
    return plot("Reward over the iterations", content, scale.labels(digits), _across(end)) + key(colours)


def _interval(score: Score, scale: Scale, end: int, what: str, css: str) -> str:
    """A mean as a dot with its interval."""
    has_ends = math.isfinite(score.low)
    low, high = (scale(score.low), scale(score.high)) if has_ends else (scale(score.mean),) * 2
    ends = f", 95 % from {number(score.low)} to {number(score.high)}" if has_ends else ""
    where = f"left:{pc(score.iteration / end)};top:{pc(1 - high)};height:{pc(high - low)};--c:var(--{css})"
    return mark("i", where, f"after {score.iteration}: {number(score.mean)}{ends}\n{what}", classes="interval")


def _curve(points: Sequence[tuple[int, float]], scale: Scale, end: int, what: str, css: str = "") -> str:
    """A line through points, averaged if there are many, that says its numbers."""
    if not points:
        return ""
    binned = _binned(points)
    drawn = line([(x / end, scale(y)) for _, x, y in binned], css)
    marks = []
    for first, last, y in binned:
        named = f"iteration {last}" if first == last else f"iterations {first} to {last}"
        where = f"left:{pc((first - 1) / end)};width:{pc((last - first + 1) / end)}"
        marks.append(mark("i", where, f"{named}: {digits(y)}\n{what}", classes="hit"))
    return drawn + "".join(marks)


def _binned(points: Sequence[tuple[int, float]]) -> list[tuple[int, int, float]]:
    """First and last iteration of each bin, and the mean of its values."""
    width = -(-len(points) // MOST_POINTS)
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    return [(some[0][0], some[-1][0], sum(y for _, y in some) / len(some)) for some in bins]


def _across(end: int) -> list[tuple[float, str]]:
    """Iterations on the scale below a chart."""
    return [(at / end, f"{at:g}") for at in ticks(end) if at == int(at)]


def _small(view: RunView, name: str, title: str, show: Callable[[float], str] = digits) -> str:
    """A low chart of one metric; nothing if no iteration has it."""
    points = _points(view.lines, name)
    if len(points) < 2:
        return ""
    scale, end = Scale(y for _, y in points), max(view.iteration, 1)
    body = plot(title, _curve(points, scale, end, title), scale.labels(show), _across(end), "low")
    return f"<div><h3>{escape(title)}</h3>{body}</div>"


def _columns(charts: Iterable[str]) -> str:
    shown = "".join(charts)
    return f'<div class="columns">{shown}</div>' if shown else ""


def _pictures(view: RunView) -> str:
    figures = []
    for name, what in pictures_of(view.folder).items():
        version = (view.folder / name).stat().st_mtime_ns  # else the browser shows the one before
        image = f'<img src="{escape(name)}?{version}" alt="{escape(what)}">'
        box = f'<div class="picture" role="region" tabindex="0" aria-label="{escape(what)}">{image}</div>'
        figures.append(f"<figure>{box}<figcaption>{escape(what)}</figcaption></figure>")
    return "".join(figures)


def _results(view: RunView) -> str:
    before, after, gain = view.before, view.after, view.gain
    if before is None:
        return ""
    if after is None:
        rows = [row("all", score_cells(before, before, None)[0], str(before["prompts"]), str(before["images"]))]
        return table((f"reward on {view.evaluated}", "before", "prompts", "images"), rows, "Before training")
    tags = before["tags"] if len(before["tags"]) > 1 else {}
    rows = [
        row(escape(tag), *score_cells(old, after["tags"][tag], gain and gain["tags"][tag])) for tag, old in tags.items()
    ]
    rows.append(row("all", *score_cells(before, after, gain), classes="total"))
    head = (f"reward on {view.evaluated}", "before", "after", "gain", "prompts", "images")
    return table(head, rows, "Before and after training")


def _signs(view: RunView) -> str:
    names = dict.fromkeys(name for one in view.lines for name in one if name.startswith("look/") and "_ratio" in name)
    titles = {name: name.removeprefix("look/").removesuffix("_ratio").replace("_", " ") for name in names}
    charts = _columns(_small(view, name, f"{title}, over the base model's") for name, title in titles.items())
    return charts and f'<p class="soft">Of the same prompts drawn again and again; 1 is the base model.</p>{charts}'


def _time(view: RunView) -> str:
    if not view.lines:
        return ""
    whole = sum(one["iteration_s"] for one in view.recent) / len(view.recent)
    phases = {
        name: sum(one.get(f"{name}_s", 0.0) for one in view.recent) / len(view.recent)
        for name in ("encode", "rollout", "decode", "reward", "train", "optimizer", "communicate")
    }
    phases = {name: spent for name, spent in phases.items() if spent > 0}
    phases["other"] = max(whole - sum(phases.values()), 0.0)
    total = sum(phases.values()) or 1.0
    pieces = "".join(
        labelled(name, spent / total, f"{name}: {seconds(spent)}, {percent(100 * spent / total)}", spent / total)
        for name, spent in phases.items()
    )
    rows = [
        row(chip(name), seconds(spent), percent(100 * spent / total) + bar(spent / total, name))
        for name, spent in phases.items()
    ]
    stacked = chart("Seconds per phase", f'<div class="stack">{pieces}</div>')
    charts = _columns([_small(view, "images_per_s", "Images per second")])
    return (
        f'<p class="soft">The mean of the last {len(view.recent)} iterations, {seconds(whole)} each.</p>'
        f"{stacked}{legend(phases)}{table(('phase', 'mean', 'share'), rows, 'Seconds per phase')}{charts}"
    )


def _learning(view: RunView) -> str:
    parts = dict.fromkeys(name for one in view.lines for name in one if name.startswith("reward/"))
    named = {name: f"Reward: {name.removeprefix('reward/').removesuffix('_mean')}" for name in parts}
    shown = (named if len(named) > 1 else {}) | LEARNING
    return _columns(_small(view, name, title) for name, title in shown.items())


def _events(view: RunView) -> str:
    rows = "".join(
        f"<li><time>{_moment(moment)}</time><span>{escape(text)}</span></li>" for moment, text in reversed(view.events)
    )
    return rows and f'<ul class="events">{rows}</ul>'


def _settings(view: RunView) -> str:
    settings, usual = flat(view.config), flat(get_recipe(view.config.recipe))
    changed = {name: value for name, value in settings.items() if usual.get(name) != value}
    return (
        f'<p class="soft">Those that differ from the recipe {escape(view.config.recipe)}:</p>{pairs(changed)}'
        f"<details><summary>All settings</summary>{pairs(settings)}</details>"
    )


def _points(lines: Sequence[Metrics], name: str) -> list[tuple[int, float]]:
    return [(one["iteration"], one[name]) for one in lines if _known(one.get(name))]


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ends(scores: JsonObject) -> tuple[float, float, float]:
    """Mean and interval; no interval over few prompts."""
    mean, (low, high) = scores["reward_mean"], scores["reward_ci95"]
    if scores.get("prompts", FEWEST_PROMPTS) < FEWEST_PROMPTS or low is None:
        low = high = math.nan
    return (math.nan if mean is None else mean), low, high


def _moment(since_1970_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_1970_s))
