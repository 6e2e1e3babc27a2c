"""The folder of an evaluation: numbered pictures, a line of scores for each, and what it was made with."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from dgpo_fast.config.reading import read_yaml
from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.prompt import NEGATIVE_KEY
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards.weighted import CONTENT
from dgpo_fast.run.depends import change, changed
from dgpo_fast.run.folder import HOLDER, LOCK, FolderLock
from dgpo_fast.run.metrics import json_line, read_metrics

MADE_WITH, INDEX, RESULTS, CONTACT_SHEET = "evaluation.yaml", "index.jsonl", "results.json", "contact_sheet.png"

NEEDED = ("model", "lora", "weights", "rewards", "seed", "num_inference_steps", "guidance_scale", "images_count")
"""What the folder is read for."""

DIGESTS = ("prompts_sha256", "weights_sha256", "lora_sha256")
"""Stand for what settings name. All but these and the contents of rewards are settings themselves."""


@dataclass(frozen=True)
class Row:
    """One picture and its scores.

    Attributes:
        sample: its number, which keys its initial noise.
        prompt: what it was drawn for.
        reward: the weighted sum of the rewards; NaN if one of them failed.
        scores: each reward's score under its name, and its parts as `name/part`; NaN if there is none.
        fault: what is wrong with a picture that is not finite, and so has no scores; else empty.
    """

    sample: int
    prompt: Prompt
    reward: float
    scores: dict[str, float]
    fault: str = ""

    @property
    def failed(self) -> bool:
        """Whether the picture has no reward: one of them failed on it, or it is not finite."""
        return math.isnan(self.reward)

    @property
    def image(self) -> str:
        """The picture's place in the folder."""
        return f"images/{self.sample:06d}.png"

    def to_json(self) -> JsonObject:
        """The row as a line of the index."""
        return {
            "sample": self.sample,
            "image": self.image,
            "prompt": self.prompt.text,
            "tag": self.prompt.tag,
            "reward": self.reward,
            "scores": self.scores,
            "metadata": self.prompt.metadata,
            **({"fault": self.fault} if self.fault else {}),
        }

    @classmethod
    def from_json(cls, line: JsonObject) -> "Row":
        """What `to_json` gave."""
        scores = {name: _number(value) for name, value in line["scores"].items()}
        prompt = Prompt(line["prompt"], line["metadata"])
        return cls(line["sample"], prompt, _number(line["reward"]), scores, line.get("fault", ""))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def describe_model(made_with: JsonObject) -> str:
    """A phrase that says what was evaluated."""
    lora = f" with {Path(made_with['lora']).name}" if made_with["lora"] else ""
    training = f" {made_with['weights']} training" if made_with["weights"] else ""
    return f"{made_with['model']}{lora}{training}"


def _first_difference(found: JsonObject, wanted: JsonObject) -> str | None:
    return next(iter(changed({name: found.get(name) for name in wanted}, wanted)), None)


def _was_trained_further(found: JsonObject, wanted: JsonObject) -> bool:
    """Whether what was `found` is of a run as it is `wanted`, but for weights that it has trained since."""
    trained = "lora_sha256" if "lora_sha256" in wanted else "weights_sha256"
    return wanted.get("weights") == "after" and _first_difference(found, wanted) == trained


class EvaluationFolder:
    """Reads and writes one evaluation. A picture's line is only in the index if picture and scores exist."""

    def __init__(self, path: Path):
        self.path = path

    def made_with(self) -> JsonObject:
        """Settings, prompts and weights. Raises UserError if no evaluation is there."""
        path = self.path / MADE_WITH
        if not path.is_file():
            raise UserError(f"{self.path}: no evaluation is there (it has no {MADE_WITH})")
        found = {NEGATIVE_KEY: "", **read_yaml(path)}  # earlier versions had none
        lacking = next((name for name in NEEDED if name not in found), None)
        if lacking is not None:
            raise UserError(f"{path}: lacks '{lacking}'; the evaluation is damaged, make it again")
        return found

    def require_same(self, wanted: JsonObject, *, renew: bool = False) -> None:
        """Raises UserError if the folder holds another evaluation than `wanted`.

        With `renew`, an evaluation of the run before it was trained further is accepted.
        """
        if not self.path.exists():
            return
        if not (self.path / MADE_WITH).is_file():
            if self.path.is_dir() and {entry.name for entry in self.path.iterdir()} <= {
                "images",
                LOCK,
                HOLDER,
                f".{MADE_WITH}",
            }:
                return
            raise UserError(f"{self.path} exists and is no evaluation: choose another --output")
        found = self.made_with()
        different = _first_difference(found, wanted)
        if different is None:
            return
        if _was_trained_further(found, wanted):
            if renew:
                return
            raise UserError(
                f"{wanted['model']} has been trained further since {self.path} was made: remove that folder, or choose "
                "another --output"
            )
        remedy = "choose another --output, or remove that folder"
        if different in DIGESTS or different.startswith(CONTENT):
            raise UserError(change(self.path, [different], "it was made", remedy))
        setting = f"{different} {found.get(different)}, not {wanted[different]}"
        raise UserError(f"{self.path} was made with {setting}: {remedy}")

    def is_outdated(self, wanted: JsonObject) -> bool:
        """Whether its run has been trained further since it was made."""
        return (self.path / MADE_WITH).is_file() and _was_trained_further(self.made_with(), wanted)

    def begin(self, made_with: JsonObject, *, renew: bool = False) -> FolderLock:
        """Creates the folder, or continues in it, and locks it for this process.

        With `renew`, an evaluation of the run before it was trained further is removed. Raises UserError if the
        folder holds another evaluation, or if another process is at work in it.
        """
        self.require_same(made_with, renew=renew)
        (self.path / "images").mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path)
        if self.is_outdated(made_with):
            for name in (INDEX, RESULTS, CONTACT_SHEET):  # the index first: without it, no picture counts
                (self.path / name).unlink(missing_ok=True)
            for picture in (self.path / "images").glob("*.png"):
                picture.unlink()
        staged = self.path / f".{MADE_WITH}"
        staged.write_text(yaml.safe_dump(made_with, sort_keys=False, allow_unicode=True), encoding="utf-8")
        staged.replace(self.path / MADE_WITH)
        return lock

    def rows(self) -> list[Row]:
        """The pictures that exist, with their scores, in order, up to the first that is missing."""
        path = self.path / INDEX
        try:
            rows = [Row.from_json(line) for line in read_metrics(path)] if path.is_file() else []
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: a line is damaged; remove it and the lines after it") from None
        there = (row.sample == number and self.image_path(row).is_file() for number, row in enumerate(rows))
        return rows[: next((number for number, fine in enumerate(there) if not fine), len(rows))]

    def image_path(self, row: Row) -> Path:
        """Where a row's picture is."""
        return self.path / row.image

    def read_image(self, row: Row) -> np.ndarray:
        """A picture, uint8 (H, W, 3)."""
        with Image.open(self.image_path(row)) as picture:
            return np.asarray(picture.convert("RGB"))

    def write_image(self, sample: int, image: np.ndarray) -> None:
        """Writes picture number `sample`, uint8 (H, W, 3)."""
        Image.fromarray(image).save(self.path / f"images/{sample:06d}.png", compress_level=4)

    def resume(self, batch_size: int) -> list[Row]:
        """`rows` in whole batches, so that later batches are those of an uninterrupted evaluation; the rest goes."""
        rows = self.rows()
        if len(rows) < self.made_with()["images_count"]:
            rows = rows[: len(rows) // batch_size * batch_size]
        self.write(rows)
        return rows

    def write(self, rows: Iterable[Row]) -> None:
        """Rewrites the index in one step."""
        staged = self.path / f".{INDEX}"
        staged.write_text("".join(json_line(row.to_json()) for row in rows), encoding="utf-8")
        staged.replace(self.path / INDEX)

    def append(self, rows: Iterable[Row]) -> None:
        """Adds lines to the index, whose pictures are already there."""
        with (self.path / INDEX).open("a", encoding="utf-8") as file:
            file.write("".join(json_line(row.to_json()) for row in rows))
