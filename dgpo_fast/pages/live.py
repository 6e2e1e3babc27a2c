"""Keeps the page of a run up to date while the run goes."""

import json
import time
from collections import deque
from pathlib import Path

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.pages.run_page import FILE, RunView, run_page
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.run.console import Console, with_nan
from dgpo_fast.run.metrics import json_line, read_metrics
from dgpo_fast.wording import one_line

EVENTS = "events.jsonl"
EVERY_S = 5.0
MOST_EVENTS = 200


class LivePage:
    """`index.html` of the run in `folder`, and `events.jsonl`, the lines that it has printed.

    A page that cannot be written is left out with a note, and never ends the run.

    Args:
        folder: the run's.
        config: its settings.
        console: where its lines are noted.
        evaluated: the prompts of its evaluations, as in "held-out prompts".
        iteration: finished ones, of a run that is resumed.
        quiet: write nothing, as all processes of a run do but the first.
    """

    def __init__(
        self, folder: Path, config: Config, console: Console, evaluated: str, iteration: int, quiet: bool = False
    ):
        self.folder, self.config, self.console, self.evaluated = folder, config, console, evaluated
        self.lines = [_numbers(one) for one in _earlier(folder / "metrics.jsonl") if one["iteration"] <= iteration]
        self.events = deque([(one["time_s"], one["text"]) for one in _earlier(folder / EVENTS)], MOST_EVENTS)
        self.state, self.live = "", True
        self.before: JsonObject | None = None
        self.is_off = quiet
        self._written_s = 0.0

    def say(self, state: str, *, live: bool = True) -> None:
        """Shows what the run is doing from now on, and whether it goes on."""
        self.state, self.live = state, live
        self._write()

    def write(self, metrics: Metrics) -> None:
        """Adds an iteration; the page follows within `EVERY_S`."""
        self.lines.append(_numbers(metrics))
        self.state = "Training"
        if time.monotonic() - self._written_s >= EVERY_S:
            self._write()

    def _write(self) -> None:
        if self.is_off or not self.folder.is_dir():
            return
        try:
            self._keep_events()
            staged = self.folder / f".{FILE}"
            staged.write_text(run_page(self._view()), encoding="utf-8")
            staged.replace(self.folder / FILE)
        except OSError as error:
            self.is_off = True
            self.console.note(f"{self.folder / FILE} is no longer written: {error.strerror or one_line(error)}")
        self._written_s = time.monotonic()

    def _view(self) -> RunView:
        results = self.folder / "summary.json"
        done = json.loads(results.read_text(encoding="utf-8")) if not self.live and results.is_file() else {}
        return RunView(
            folder=self.folder,
            config=self.config,
            state=self.state,
            live=self.live,
            lines=self.lines,
            evaluated=self.evaluated,
            before=self.before,
            after=with_nan(done.get("after")),
            gain=with_nan(done.get("gain")),
            events=list(self.events),
        )

    def _keep_events(self) -> None:
        new = self.console.take_notes()
        self.events.extend(new)
        with (self.folder / EVENTS).open("a", encoding="utf-8") as file:
            file.writelines(json_line({"time_s": moment, "text": text}) for moment, text in new)


def _numbers(metrics: Metrics) -> Metrics:
    """What the page may show of an iteration."""
    return {name: value for name, value in metrics.items() if name != "processes"}


def _earlier(path: Path) -> list[JsonObject]:
    """Lines that an earlier start of the run has written; none if they are damaged."""
    try:
        return read_metrics(path) if path.is_file() else []
    except UserError:
        return []
