"""The output of a run: a progress bar on a terminal, plain lines elsewhere."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.wording import FEWEST_PROMPTS, number

PLAIN_LINE_EVERY_S = 5.0
MOST_NOTES = 1000


class Console:
    """Progress and results of one run on standard output.

    Args:
        quiet: say nothing, as all processes of a run do but the first.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(highlight=False, quiet=quiet)
        self.progress: Progress | None = None
        self.last_line_s = 0.0
        self._notes: deque[tuple[float, str]] = deque(maxlen=MOST_NOTES)

    def note(self, text: str) -> None:
        """One line, which is also kept for `take_notes`."""
        if not self.rich.quiet:
            self._notes.append((time.time(), text))
        self._print(text)

    def take_notes(self) -> list[tuple[float, str]]:
        """The notes since the last call, and their moments in seconds since 1970; the latest ones, if they are many."""
        taken = list(self._notes)
        self._notes.clear()
        return taken

    def _print(self, text: str) -> None:
        """Wrapped by the terminal, never by us, so that paths can be copied."""
        self.rich.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def track(self, label: str) -> Iterator[Callable[[float], None]]:
        """Gives a callback that shows the progress of one piece of work; call it with the finished share, in (0, 1]."""
        if self.rich.quiet or not self.rich.is_terminal:
            self._print(f"{label} …")
            yield lambda share: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        with Progress(*columns, console=self.rich, transient=True) as progress:
            task = progress.add_task(label, total=1.0)
            yield lambda share: progress.update(task, completed=share)

    @contextmanager
    def count(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[float], None]]:
        """Gives a callback that shows how many of `total` things are done, how fast, and what is left.

        Call it with the number done, which may be a fraction.
        """
        first, started_s, shown_s = done, time.monotonic(), time.monotonic()

        def line(now_done: float) -> str:
            passed_s = max(time.monotonic() - started_s, 1e-9)
            speed = (now_done - first) / passed_s
            left = duration((total - now_done) / speed) if speed else "?"
            return f"{int(now_done)}/{total} {what}  {speed:.3g} {what}/s  {left} left"

        def plain(now_done: float) -> None:
            nonlocal shown_s
            if time.monotonic() - shown_s >= PLAIN_LINE_EVERY_S or now_done == total:
                shown_s = time.monotonic()
                self._print(line(now_done))

        if not self.rich.is_terminal:
            yield plain
            return
        columns = (BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self.rich, transient=True) as progress:
            task = progress.add_task("", total=total, completed=done)
            yield lambda now_done: progress.update(task, completed=now_done, description=line(now_done))

    def start_training(self, done: int, total: int) -> None:
        """Opens the bar of the training loop, or announces the plain lines."""
        self.started_s, self.first, self.total = time.monotonic(), done, total
        if self.rich.is_terminal and not self.rich.quiet:
            columns = (BarColumn(bar_width=6), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
            self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.rich)
            self.task = self.progress.add_task("training", completed=done, total=total, status="")
            self.progress.start()

    def iteration(self, metrics: Metrics) -> None:
        """Shows one iteration's reward, speed, phases and what is left."""
        done, now = metrics["iteration"], time.monotonic()
        eta_s = (now - self.started_s) / max(done - self.first, 1) * (self.total - done)
        reward = metrics.get("reward_mean")
        head = f"reward {number(reward)}" if reward is not None else "no group scored"
        speed = f"{metrics['images_per_s']:.3g} img/s"
        looked = "look/reward_mean" in metrics
        if looked:
            head += f" (fixed prompts: {with_interval(of_look(metrics))})"
        if self.progress:
            phases = f"rollout {metrics.get('rollout_s', 0):.1f} train {metrics.get('train_s', 0):.1f} s"
            status = f"{head} · {speed} · {phases} · {duration(eta_s)} left"
            self.progress.update(self.task, completed=done, status=status)
        elif looked or done == self.total or done == self.first + 1 or now - self.last_line_s >= PLAIN_LINE_EVERY_S:
            self.last_line_s = now
            phases = " ".join(f"{k.removesuffix('_s')} {v:.2f}" for k, v in metrics.items() if k in PHASE_KEYS)
            self._print(f"iteration {done}/{self.total}  {head}  {speed}  {duration(eta_s)} left  (s: {phases})")

    def stop_training(self) -> None:
        """Closes the bar."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def before_after(self, before: JsonObject, after: JsonObject, gain: JsonObject | None, evaluated: str) -> None:
        """The table that ends a run: mean reward on what was evaluated, per tag, with 95 % intervals.

        Args:
            before, after: what `Evaluation.summary` gave.
            gain: what `Evaluation.gain` gave; if it is None, the difference of the means is shown.
            evaluated: which prompts, for the title.
        """
        title = f"reward on {evaluated}, 95 % interval"
        # 80 columns hold it, with the longest of GenEval's tags.
        table = Table("tag", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in ("before", "after", "gain", "prompts", "images"):
            table.add_column(name, justify="right")
        if len(before["tags"]) > 1:
            for tag, old in before["tags"].items():
                table.add_row(escape(tag), *score_cells(old, after["tags"][tag], gain and gain["tags"][tag]))
            table.add_section()
        table.add_row("all", *score_cells(before, after, gain), style="bold")
        self.rich.print(table)


PHASE_KEYS = ("encode_s", "rollout_s", "decode_s", "reward_s", "train_s", "optimizer_s")


def duration(seconds: float) -> str:
    """`75` → `1:15`; hours if there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def with_nan(scores: JsonObject | None) -> JsonObject | None:
    """Scores that were read from JSON, and those of their tags, with NaN for null."""
    if scores is None:
        return None
    tags = {tag: with_nan(own) for tag, own in scores.get("tags", {}).items()}
    mean, *ends = (math.nan if one is None else one for one in (scores["reward_mean"], *scores["reward_ci95"]))
    return {**scores, "reward_mean": mean, "reward_ci95": ends, "tags": tags}


def score_cells(before: JsonObject, after: JsonObject, gain: JsonObject | None) -> list[str]:
    """Before, after, gain, prompts and images, as tables show them; see `Console.before_after`."""
    means = number(after["reward_mean"] - before["reward_mean"], sign="+")
    shown = means if gain is None else with_interval(gain, sign="+")
    return [with_interval(before), with_interval(after), shown, str(after["prompts"]), str(after["images"])]


def of_look(metrics: Metrics) -> JsonObject:
    """The reward of a look in an iteration's metrics, as `with_interval` takes it."""
    return {
        "reward_mean": metrics["look/reward_mean"],
        "reward_ci95": metrics["look/reward_ci95"],
        "prompts": metrics["look/prompts_count"],
    }


def with_interval(scores: JsonObject, sign: str = "") -> str:
    """`0.564 ± 0.053`; of fewer than five prompts, `0.564` alone."""
    low, high = scores["reward_ci95"]
    interval = f" ± {number((high - low) / 2)}" if scores["prompts"] >= FEWEST_PROMPTS else ""
    return f"{number(scores['reward_mean'], sign=sign)}{interval}"
