"""A folder of scored groups on disk.

`groups.json` holds the settings of the groups; the groups themselves are in safetensors files. A file is either
complete or absent, so drawing that was stopped continues with the next file. Nothing is unpickled.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.records import JsonObject
from dgpo_fast.rollout.source import Groups
from dgpo_fast.run.depends import change, changed
from dgpo_fast.run.metrics import write_json
from dgpo_fast.wording import one_line

MANIFEST = "groups.json"
PART = "part:"


@dataclass(frozen=True)
class Drawing:
    """The groups of a folder.

    Attributes:
        conditions: what they were drawn and scored with; a run with other ones cannot use them.
        groups: how many there are when all are drawn.
        file_groups: how many a file holds.
        seed: of prompts and noise.
    """

    conditions: JsonObject
    groups: int
    file_groups: int
    seed: int

    @property
    def files(self) -> list[range]:
        """The groups of each file, by number."""
        starts = range(0, self.groups, self.file_groups)
        return [range(start, min(start + self.file_groups, self.groups)) for start in starts]


@dataclass(frozen=True)
class GroupPlace:
    """Where one group lies: a file and the group's position in it."""

    path: Path
    row: int


EARLIER: Mapping[str, object] = {
    "rollout.negative_prompt": "",
    "rollout.noise_kind": "sde",
    "rollout.share_initial_noise": False,
}
"""Conditions that earlier versions did not keep, as they were."""


@dataclass(frozen=True)
class Stored:
    """One group as it was stored: x0 (G, C, H, W) fp32, rewards and their parts (G,) fp32."""

    prompt: Prompt
    x0: Tensor
    rewards: np.ndarray
    parts: dict[str, np.ndarray]


class GroupFolder:
    """Reads and writes the groups in the folder `home`.

    Args:
        home: the folder.
        earlier: conditions as earlier versions would have kept them (`depends.changed`).
    """

    def __init__(self, home: Path, earlier: Mapping[str, object] | None = None):
        self.home, self.earlier = home, earlier

    def drawing(self, wanted: Drawing) -> Drawing | None:
        """The folder's drawing; None if there is none. Raises UserError if it differs from `wanted`."""
        path = self.home / MANIFEST
        if not path.exists():
            return None
        try:
            found = Drawing(**json.loads(path.read_text(encoding="utf-8")))
            conditions = {**EARLIER, **found.conditions}
            before = {name: conditions.get(name) for name in wanted.conditions}
            differs = changed(before, wanted.conditions, self.earlier)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: damaged; name another --data.folder, or remove this one") from None
        if found.groups != wanted.groups:
            differs.append("data.offline_groups")
        if differs:
            remedy = "name another --data.folder, or remove this one to have them drawn anew"
            raise UserError(change(self.home, differs, "its groups were drawn", remedy))
        return found

    def start(self, drawing: Drawing) -> None:
        """Makes the folder, with nothing drawn yet."""
        self.home.mkdir(parents=True, exist_ok=True)
        write_json(self.home / MANIFEST, asdict(drawing))

    def path(self, number: int) -> Path:
        """The path of file `number`."""
        return self.home / f"groups-{number:06d}.safetensors"

    def write(self, number: int, groups: Groups, seconds: float) -> None:
        """Writes the groups that could be scored as file `number`; `seconds` is what drawing them took."""
        scores = groups.scores
        valid = np.flatnonzero(scores.valid)
        rows = torch.from_numpy(np.flatnonzero(np.repeat(scores.valid, len(groups.x0) // len(groups.prompts))))
        tensors = {"x0": groups.x0.cpu()[rows], "rewards": torch.from_numpy(scores.rewards[valid])}
        tensors |= {f"{PART}{name}": torch.from_numpy(part[valid]) for name, part in scores.parts.items()}
        about = {
            "prompts": json.dumps([groups.prompts[index].to_json() for index in valid]),
            "dropped": str(len(groups.prompts) - len(valid)),
            "seconds": str(seconds),
        }
        with written_whole(self.path(number)) as file:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=about)

    def index(self, drawing: Drawing) -> tuple[list[GroupPlace], float, int]:
        """Where every group lies, the seconds that drawing took, and how many could not be scored."""
        places: list[GroupPlace] = []
        seconds, dropped = 0.0, 0
        for number in range(len(drawing.files)):
            path = self.path(number)
            with _opened(path) as file:
                about = file.metadata()
            places += [GroupPlace(path, row) for row in range(len(json.loads(about["prompts"])))]
            seconds += float(about["seconds"])
            dropped += int(about["dropped"])
        return places, seconds, dropped


def load(place: GroupPlace) -> Stored:
    """One group, read from its file without the others."""
    with _opened(place.path) as file:
        prompts = json.loads(file.metadata()["prompts"])
        x0 = file.get_slice("x0")
        size = x0.get_shape()[0] // len(prompts)
        names = [name for name in file.keys() if name.startswith(PART)]  # noqa: SIM118
        return Stored(
            prompt=Prompt.from_json(prompts[place.row]),
            x0=x0[place.row * size : (place.row + 1) * size],
            rewards=file.get_slice("rewards")[place.row].numpy(),
            parts={name.removeprefix(PART): file.get_slice(name)[place.row].numpy() for name in names},
        )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` at the end of the block. Raises UserError if it cannot be written."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield staged
        staged.replace(path)
    except (OSError, SafetensorError) as error:
        staged.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({one_line(error)}): free space and --resume") from None


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}): remove it and it is drawn again") from None
