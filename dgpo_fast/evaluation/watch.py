"""Looks at fixed prompts during training: a growing strip of pictures, and signs of reward hacking.

A look draws a few images of held-out prompts, always from the same noise, and compares them with the base model's.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dgpo_fast.config.watch_options import Watch as WatchConfig
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.before_after import RunEvaluations
from dgpo_fast.evaluation.figures import before_after_grid, progress_strip
from dgpo_fast.evaluation.held_out import WATCHED, Evaluation
from dgpo_fast.evaluation.results import earlier_evaluation, written_to
from dgpo_fast.evaluation.rules import alarms, last_good, unconfirmed
from dgpo_fast.models.policy import Weights
from dgpo_fast.prompts import Prompt, in_turn
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.rewards import RewardPool, load_rewards
from dgpo_fast.rewards.shipped.pixels import grid_growth, statistics
from dgpo_fast.rewards.weighted import scored_by_all
from dgpo_fast.run.checkpoint import newest_until
from dgpo_fast.run.console import of_look, with_interval
from dgpo_fast.run.metrics import read_metrics

LOOKS, BASE_FILE, STRIP = "looks", "base.npz", "progress.png"
SHOWN_PROMPTS = 8
SHOWN_LOOKS = 16
THUMBNAIL_PX = 128


@dataclass(eq=False)
class Watch:
    """The looks of one run. All processes must call each method together.

    Attributes:
        config: which pictures, and which rules.
        evaluations: draw and score.
        beside: the rewards that are not trained on; None if there are none.
        folder: the run's, once the looks have begun; before, there are none.
        looks: lines of metrics of the looks so far.
        told: the alarms of the last look.
        stopped: whether a rule has asked for the run's end.
    """

    config: WatchConfig
    evaluations: RunEvaluations
    beside: RewardPool | None
    folder: Path | None = None
    looks: list[Metrics] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    base: Evaluation | None = None

    @cached_property
    def prompts(self) -> list[Prompt]:
        """One prompt for each image, the images of a prompt together."""
        held_out = list({prompt.text: prompt for prompt in self.evaluations.prompts.held_out}.values())
        count = min(self.config.prompts, len(held_out))
        chosen = in_turn(held_out, lambda prompt: prompt.tag, count)
        return [prompt for prompt in chosen for _ in range(self.config.images_per_prompt)]

    def begin(self, folder: Path, iteration: int) -> None:
        """Draws the base model's pictures, or reads what an earlier start of the run has drawn.

        Args:
            folder: the run's.
            iteration: finished ones; looks after it are forgotten.
        """
        if not self.config.every:
            return
        processes, home = self.evaluations.processes, folder / LOOKS
        if processes.first:
            home.mkdir(exist_ok=True)
            self.base = self._earlier_base(home)
        if not processes.broadcast(self.base is not None, "the first look"):
            base = self._drawn(self.evaluations.models.initial_weights(), begun=False)
            with processes.together("the pictures of the first look"):
                if processes.first:
                    self.base = base
                    with written_to(folder):
                        base.save(home / BASE_FILE, shown=len(base.images))
                        _column(self._first(base)).save(home / _name(0))
        # A run may go on in another folder than its first iterations.
        lines = read_metrics(path) if processes.first and (path := folder / "metrics.jsonl").exists() else []
        earlier = [line for line in lines if "look/reward_mean" in line and line["iteration"] <= iteration]
        self.looks = processes.broadcast(earlier, "the looks so far")
        self.told = self._alarms()
        self.folder = folder

    def due(self, iteration: int) -> bool:
        """Whether there is a look after `iteration` iterations: it is its turn, or the look just before it has a sign
        that another look is to confirm."""
        if self.folder is None:
            return False
        asked = self.config.rules != "off" and unconfirmed(self.looks, self.config)
        return iteration % self.config.every == 0 or (asked and self.looks[-1]["iteration"] == iteration - 1)

    def look(self, weights: Weights, line: Metrics) -> Metrics:
        """Draws with `weights`, and returns the look's metrics; empty, with a note, if nothing could be scored.

        Args:
            weights: to look at.
            line: the metrics of the iteration, with its number.
        """
        assert self.folder is not None
        processes, console = self.evaluations.processes, self.evaluations.console
        try:
            drawn = self._drawn(weights, begun=True)
        except UserError as error:
            console.note(f"look skipped: {error}")
            return {}
        found = self._metrics(drawn) if processes.first else None
        found = processes.broadcast(found, "the metrics of the look")
        self.looks.append({**line, **found})
        before, self.told = self.told, self._alarms()
        found["look/alarms"] = self.looks[-1]["look/alarms"] = list(self.told)
        is_new = bool(self.told.keys() - before.keys())
        self.stopped |= is_new and self.config.rules == "stop"
        with processes.together("the pictures of a look"):
            if processes.first:
                with written_to(self.folder):
                    _column(self._first(drawn)).save(self.folder / LOOKS / _name(line["iteration"]))
                    self._write_strip()
                    if is_new:
                        self._warn(drawn, line["iteration"])
        return found

    @property
    def good(self) -> int | None:
        """The iteration of the last look that gives no sign; None if no rule is on."""
        if self.folder is None or self.config.rules == "off":
            return None
        return last_good(self.looks, self.config)

    def summary(self) -> JsonObject:
        """What `summary.json` says of the looks."""
        if self.base is None or not self.looks:
            return {}
        fired = [
            {"iteration": look["iteration"], "rules": look["look/alarms"]}
            for look in self.looks
            if look.get("look/alarms")
        ]
        return {
            "watch": {
                "prompts": len(self.prompts) // self.config.images_per_prompt,
                "images": len(self.prompts),
                "base": self._base_statistics,
                "last": {
                    name.removeprefix("look/"): value for name, value in self.looks[-1].items() if "look/" in name
                },
                "alarms": fired,
                "last_good_iteration": self.good,
                "stopped_by_rule": self.stopped,
            }
        }

    def close(self) -> None:
        """Ends the threads of the rewards beside the trained ones."""
        if self.beside is not None:
            self.beside.close()

    def _earlier_base(self, home: Path) -> Evaluation | None:
        contents = self.evaluations.rewards.reward.contents
        contents |= {} if self.beside is None else self.beside.reward.contents
        found = earlier_evaluation(home / BASE_FILE, contents, self.evaluations.console.note)
        same = found is not None and [one.text for one in found.prompts] == [one.text for one in self.prompts]
        return found if same else None

    def _first(self, drawn: Evaluation) -> Evaluation:
        """The first image of each of the first prompts."""
        return drawn.some(slice(0, SHOWN_PROMPTS * self.config.images_per_prompt, self.config.images_per_prompt))

    def _drawn(self, weights: Weights, *, begun: bool) -> Evaluation:
        return self.evaluations.look(weights, self.prompts, self.beside, begun=begun)

    @cached_property
    def _base_statistics(self) -> dict[str, float]:
        assert self.base is not None
        return statistics(self.base.images, self.config.images_per_prompt)

    def _metrics(self, drawn: Evaluation) -> Metrics:
        """Rewards and statistics of `drawn`, on their own and against the base's; process 0 alone has these."""
        assert self.base is not None
        summary, found = drawn.summary(), statistics(drawn.images, self.config.images_per_prompt)
        metrics: Metrics = {f"look/{key}": summary[key] for key in ("reward_mean", "reward_ci95")}
        metrics |= {"look/prompts_count": summary["prompts"]} | _gain("reward", drawn, self.base)
        for name in () if self.beside is None else (f"{WATCHED}{one}" for one in self.beside.reward.rewards):
            metrics[f"look/{name}_mean"] = summary["parts"][name]
            metrics |= _gain(name, drawn.of_part(name), self.base.of_part(name))
        for name, value in found.items():
            base = self._base_statistics[name]
            ratio = {f"look/{name}_ratio": value / base} if base > 0 else {}
            metrics |= {f"look/{name}": value, **ratio}
        metrics["look/dark_share_base"] = self._base_statistics["dark_share"]
        return metrics | {"look/grid_ratio": grid_growth(drawn.images, self.base.images)}

    def _alarms(self) -> dict[str, str]:
        return {} if self.config.rules == "off" else alarms(self.looks, self.config)

    def _warn(self, drawn: Evaluation, iteration: int) -> None:
        """Writes the picture of an alarm, and says so in one line."""
        assert self.folder is not None and self.base is not None
        picture = self.folder / f"alarm-{iteration:06d}.png"
        before_after_grid(self._first(self.base), self._first(drawn), picture)
        kept = newest_until(self.folder / "checkpoints", self.good or 0)
        self.evaluations.console.note(
            f"iteration {iteration}: signs of reward hacking: {', '.join(self.told.values())}: look at {picture}; "
            f"the last good checkpoint is {kept}"
        )

    def _write_strip(self) -> None:
        assert self.folder is not None and self.base is not None
        numbers = [0, *(look["iteration"] for look in self.looks)]
        shown = sorted({numbers[round(at)] for at in np.linspace(0, len(numbers) - 1, SHOWN_LOOKS)})
        shown = [number for number in shown if (self.folder / LOOKS / _name(number)).is_file()]
        columns = [np.asarray(Image.open(self.folder / LOOKS / _name(number))) for number in shown]
        scores = {0: self.base.summary(), **{look["iteration"]: of_look(look) for look in self.looks}}
        labels = [f"{number}\n{with_interval(scores[number])}" for number in shown]
        captions = [prompt.text for prompt in self._first(self.base).prompts]
        progress_strip(columns, labels, captions, self.folder / STRIP)


def make_watch(evaluations: RunEvaluations, device: torch.device, size: tuple[int, int]) -> Watch:
    """The looks of a run, with rewards beside the trained ones, tried out on pictures of `size`.

    Raises UserError, one line, if such a reward cannot be used, or if a process would have no image.
    """
    config, note, processes = evaluations.config, evaluations.console.note, evaluations.processes
    watch = Watch(config.watch, evaluations, None)
    if config.watch.every and len(watch.prompts) < processes.count:
        count = len(watch.prompts)
        raise UserError(f"watch.prompts: a look has {count} images, and {processes.count} processes need one each")
    if not config.watch.rewards:
        return watch
    reward = load_rewards(config.watch.rewards, device)
    twice = next((name for name in reward.rewards if name in evaluations.rewards.reward.rewards), None)
    if twice is not None:
        raise UserError(f"watch.rewards {twice}: it is trained on; name a reward that is not")
    asked = [scored_by_all(prompt) for prompt in watch.prompts]
    for line in reward.check_prompts(asked):
        note(line)
    reward.try_out(asked, {1: size})
    watch.beside = RewardPool(reward, workers=0, deadline_s=config.reward_deadline_s, device=device, note=note)
    return watch


def _gain(name: str, after: Evaluation, before: Evaluation) -> Metrics:
    gain = after.gain(before)
    assert gain is not None
    return {f"look/{name}_gain_mean": gain["reward_mean"], f"look/{name}_gain_ci95": gain["reward_ci95"]}


def _name(iteration: int) -> str:
    return f"{iteration:06d}.png"


def _column(drawn: Evaluation) -> Image.Image:
    """Its images, one above the other."""
    small = [Image.fromarray(image) for image in drawn.images]
    for image in small:
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return Image.fromarray(np.concatenate([np.asarray(image) for image in small]))
