"""One run of the comparison: training for a given time, with evaluations in between that do not count."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.compare.distance import DistanceFromBase
from benchmarks.compare.quality import PatchBank, diversity, rendered, sharpness
from benchmarks.compare.systems import SYSTEMS, Scale, configuration
from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.lifecycle import set_up, stepping
from dgpo_fast.models.work import DECODE, REFERENCE, WorkMeter
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import load_rewards
from dgpo_fast.run.metrics import write_json
from dgpo_fast.seeds import stream_seed
from dgpo_fast.tiny import data
from dgpo_fast.trainer import Trainer

# Early evaluations lie closer together: the fast systems are quick.
MARKS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
QUALITY_IMAGES = 192
GROUP_OF_DIVERSITY = 8
RESULT, POINTS = "result.json", "points.json"


@dataclass(frozen=True)
class Run:
    """One piece of the comparison's work.

    Attributes:
        kind: "base" (the model as it came), "draw" (data for the offline systems), "search" (a tried setting) or
            "final".
        system: name of the system.
        seed: of prompts, noise and everything else.
        lr: learning rate.
        groups: groups per iteration.
        seconds: of training, as `clock` counts them, without evaluations; the drawing of data is training.
        marks: shares of the seconds after which the run is evaluated.
        evaluation_seed: of the evaluations' noise.
        factor: what the system's own setting is multiplied by.
    """

    kind: str
    system: str
    seed: int
    lr: float
    groups: int
    seconds: float = 0.0
    marks: tuple[float, ...] = ()
    evaluation_seed: int = 0
    factor: float = 1.0

    @property
    def name(self) -> str:
        """The run's folder, relative to the comparison's."""
        if self.kind in ("base", "draw"):
            return f"{self.kind}/seed{self.seed}"
        settings = f"-lr{self.lr:g}-groups{self.groups}" if self.kind == "search" else ""
        if settings and self.factor != 1:
            settings += f"-own{self.factor:g}"
        return f"{self.kind}/{self.system}{settings}-seed{self.seed}"

    def as_json(self) -> dict[str, Any]:
        """Its attributes as JSON keeps them."""
        return {**asdict(self), "marks": list(self.marks)}


@dataclass
class TrainingSpent:
    """Training so far: seconds as `clock` counts them, seconds on the wall, images gone through, and the work of the
    transformers in forwards of one sample."""

    seconds: float = 0.0
    wall_s: float = 0.0
    images: int = 0
    forwards: float = 0.0


def clock(device: torch.device) -> float:
    """Seconds that count: on a CPU, of this process's computing, which nothing else on the machine makes more."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


def forward_equivalents(work: WorkMeter) -> float:
    """FLOPs that the last iteration's rollouts, forwards and backwards needed, over those of one sample's forward."""
    rows = {kind: count for kind, count in work.last.items() if kind != DECODE}
    return work.flops(rows) / work.flops({REFERENCE: 1})


def perform(
    run: Run, home: Path, scale: Scale, device: str, report: Callable[[float], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Does `run` in its folder under `home`, or what is left of it, and returns what it writes as `result.json`.

    Args:
        run: what to do.
        home: the comparison's folder.
        scale: sizes of the runs.
        device: as in a run's settings.
        report: told the share done now and then.
        should_stop: True ends the run without a result.
    """
    folder = home / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
        started, config = time.perf_counter(), _configuration(run, home, scale, device)
        with set_up(config) as trainer:
            set_up_s = time.perf_counter() - started
            result = _Performance(run, home, scale, trainer, set_up_s, report, should_stop).perform()
    if result:
        result = {"run": run.as_json(), **result}
        write_json(folder / RESULT, result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def finished_result(run: Run, home: Path) -> dict[str, Any] | None:
    """What `run` wrote, if it is done; what lies in its folder from a run with other settings is removed."""
    folder = home / run.name
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        points = json.loads((folder / POINTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("run") == points.get("run") == run.as_json() else None


def _configuration(run: Run, home: Path, scale: Scale, device: str) -> Config:
    system = SYSTEMS[run.system]
    config = configuration(
        system,
        scale,
        lr=run.lr,
        groups=run.groups,
        seed=run.seed,
        evaluation_seed=run.evaluation_seed,
        device=device,
        factor=run.factor,
    )
    if not system.offline:
        return config
    return replace(config, data=replace(config.data, folder=str(_drawn(run, home) / "groups")))


def _drawn(run: Run, home: Path) -> Path:
    """Where the data of an offline run are."""
    return home / Run("draw", run.system, run.seed, run.lr, run.groups).name


class _Performance:
    def __init__(
        self,
        run: Run,
        home: Path,
        scale: Scale,
        trainer: Trainer,
        set_up_s: float,
        report: Callable[[float], None],
        should_stop: Callable[[], bool],
    ):
        self.run, self.folder, self.scale, self.trainer = run, home / run.name, scale, trainer
        self.report, self.should_stop = report, should_stop
        self.set_up_s, self.drawing = set_up_s, {"drawing_s": 0.0, "drawing_forwards": 0}
        if SYSTEMS[run.system].offline and run.kind != "draw":
            drawn = json.loads((_drawn(run, home) / RESULT).read_text(encoding="utf-8"))
            self.drawing = {name: drawn[name] for name in self.drawing}
        self.clock = partial(clock, trainer.device)
        self.points: list[dict[str, Any]] = []
        self.spent = TrainingSpent()

    def perform(self) -> dict[str, Any]:
        return {"base": self._base, "draw": self._draw}.get(self.run.kind, self._train)()

    def _draw(self) -> dict[str, Any]:
        self._write_points()
        # What a killed process had drawn is drawn again: nobody knows what it took.
        shutil.rmtree(self.folder / "groups", ignore_errors=True)
        started = self.clock()
        self.trainer.prepare(self.folder, self.should_stop)
        drawing_s, summary = self.clock() - started, self.trainer.source.summary()
        forwards = summary["drawn_images"] * self.trainer.draw.forwards
        return {**summary, "drawing_s": drawing_s, "drawing_forwards": forwards}

    def _base(self) -> dict[str, Any]:
        self._write_points()
        bank, distance, started = PatchBank(), self._distance(), self.clock()
        point = self._point(bank, distance)
        evaluation_s, started = self.clock() - started, self.clock()
        extra = self._out_of_task()
        pictures = rendered(data.shape_prompts("heldout"), QUALITY_IMAGES, np.random.default_rng(1))
        return {
            "points": [point],
            "out_of_task": {**extra, "patch_distance": point["patch_distance"]},
            "rendered_pictures": {"patch_distance": bank.distance(pictures), "sharpness": sharpness(pictures)},
            "evaluation_s": evaluation_s,
            "out_of_task_s": self.clock() - started,
            "set_up_s": self.set_up_s,
        }

    def _train(self) -> dict[str, Any]:
        failure = None
        try:
            if not self._train_to_the_end():
                return {}
        except UserError as error:
            if self.run.kind != "search":
                raise
            failure = str(error)  # such as a learning rate at which the gradient is not finite: it is not chosen
        return {
            "points": self.points,
            "failure": failure,
            "out_of_task": self._out_of_task() if self.run.kind == "final" else None,
            "source": {**self.trainer.source.summary(), **self.drawing},
            "set_up_s": self.set_up_s,
        }

    def _train_to_the_end(self) -> bool:
        """False if it was asked to stop before."""
        is_final = self.run.kind == "final"
        bank, distance = PatchBank() if is_final else None, self._distance() if is_final else None
        self._resume()
        if not self.points:
            self.spent.seconds = self.spent.wall_s = self.drawing["drawing_s"]
            self.spent.forwards = self.drawing["drawing_forwards"]
        with stepping(self.trainer, self.folder, self.should_stop, settings={}):
            for mark in self.run.marks[len(self.points) :]:
                while self.spent.seconds < mark * self.run.seconds:
                    if self.should_stop():
                        return False
                    self._step()
                self.points.append(self._point(bank, distance))
                self._write_points()
                self.trainer.save(self.folder)
        return True

    def _resume(self) -> None:
        """Goes on from the last evaluation, whose checkpoint was written right after it."""
        try:
            kept = json.loads((self.folder / POINTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        if kept.get("run") != self.run.as_json():
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        elif any((self.folder / "checkpoints").glob("iteration-*")):
            self.trainer.resume(self.folder)
            self.points = [point for point in kept["points"] if point["iteration"] <= self.trainer.iteration]
            last = self.points[-1]
            self.spent = TrainingSpent(
                last["training_s"], last["training_wall_s"], last["trained_images"], last["training_forwards"]
            )
        self._write_points()

    def _step(self) -> None:
        started = self.clock()
        metrics = self.trainer.step()
        self.spent.seconds += self.clock() - started
        self.spent.wall_s += metrics["iteration_s"]
        self.spent.images += metrics["images_count"]
        self.spent.forwards += forward_equivalents(self.trainer.work)
        self.report(min(1.0, self.spent.seconds / self.run.seconds))

    def _distance(self) -> DistanceFromBase:
        return DistanceFromBase(self.trainer, self.scale.distance_images)

    def _point(self, bank: PatchBank | None, distance: DistanceFromBase | None) -> dict[str, Any]:
        """The scores now."""
        evaluation = self.trainer.evaluate()
        summary, shown = evaluation.summary(), evaluation.images[:QUALITY_IMAGES]
        return {
            "iteration": self.trainer.iteration,
            "training_s": self.spent.seconds,
            "training_wall_s": self.spent.wall_s,
            "trained_images": self.spent.images,
            "training_forwards": self.spent.forwards,
            "reward_mean": summary["reward_mean"],
            "reward_ci95": summary["reward_ci95"],
            "patch_distance": bank.distance(shown) if bank else None,
            "sharpness": sharpness(shown) if bank else None,
            "distance": distance.of(self.trainer.learner.evaluated_weights()) if distance else None,
        }

    def _out_of_task(self) -> dict[str, float]:
        """Diversity, and signs that can be read, by the weights of the last evaluation."""
        held_out = self.trainer.prompts.held_out
        texts = list(dict.fromkeys(prompt.text for prompt in held_out))[: self.scale.diversity_prompts]
        groups = self._pictures([text for text in texts for _ in range(GROUP_OF_DIVERSITY)], "diversity")
        signs = [Prompt(text, metadata) for text, metadata in data.sign_prompts("heldout")]
        signs = signs[:: max(1, len(signs) // self.scale.signs)][: self.scale.signs]
        pictures = self._pictures([sign.text for sign in signs], "signs")
        read = load_rewards(["ocr"]).score_groups(pictures, signs, group_size=1)
        return {
            "diversity": diversity(groups, GROUP_OF_DIVERSITY),
            "signs": float(read.rewards[read.valid].mean()) if read.valid.any() else float("nan"),
        }

    def _pictures(self, texts: list[str], stream: str) -> np.ndarray:
        trainer = self.trainer
        batches = trainer.sampler.batches(texts, trainer.eval_draw, first=0, seed=stream_seed(0, stream))
        return trainer.sampler.decode(torch.cat(list(batches))).images

    def _write_points(self) -> None:
        write_json(self.folder / POINTS, {"run": self.run.as_json(), "points": self.points})
