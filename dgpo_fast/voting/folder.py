"""The folder of a vote: numbered pictures, a line for each vote, and the preferences that these amount to.

`votes.jsonl` is what counts. Each vote is one line, on the disk before the page hears of it; taking one back is a line
too. `preferences.jsonl` is written anew from it after each of them, in one step, so that a run can read it at any time.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import yaml

from dgpo_fast.config.reading import read_yaml
from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.preferences import FILE, KEYS, Judgement, as_record
from dgpo_fast.records import JsonObject
from dgpo_fast.run.depends import change, changed
from dgpo_fast.run.folder import HOLDER, LOCK, FolderLock
from dgpo_fast.run.metrics import read_metrics

MADE_WITH, LOG, PICTURES = "vote.yaml", "votes.jsonl", "pictures"
STARS = 5
Said = Literal["rank", "rating", "skip"]


@dataclass(frozen=True)
class Vote:
    """What was said of a group.

    Attributes:
        group: its number.
        said: ranks, ratings, or nothing.
        values: one for each picture: ranks, 1 for the best and equal ones for ties, or 1 to 5 stars; none if skipped.
    """

    group: int
    said: Said
    values: tuple[int, ...] = ()


class VoteFolder:
    """Reads and writes the folder.

    Args:
        path: the folder.
        prompts: one for each group.
        group_size: pictures of a group.

    Attributes:
        votes: those that count, by group, in the order in which they came.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], group_size: int):
        self.path, self.prompts, self.group_size = path, prompts, group_size
        self.votes: dict[int, Vote] = {}

    def made_with(self) -> JsonObject:
        """What the pictures were made with; empty for a new folder. Raises UserError if it holds something else."""
        if not self.path.exists():
            return {}
        if (self.path / MADE_WITH).is_file():
            return read_yaml(self.path / MADE_WITH)
        if self.path.is_dir() and {entry.name for entry in self.path.iterdir()} <= {LOCK, HOLDER, f".{MADE_WITH}"}:
            return {}
        raise UserError(f"{self.path} exists and holds no votes: choose another --output")

    def require_same(self, wanted: JsonObject) -> None:
        """Raises UserError if the pictures of the folder were made with something else than `wanted`."""
        found = self.made_with()
        known = {name: value for name, value in wanted.items() if name in found}
        if different := next(iter(changed(known, found)), None):
            remedy = "choose another --output, or remove that folder"
            if different.endswith("sha256"):
                raise UserError(change(self.path, [different], "its pictures were drawn", remedy))
            shown = different.replace("images_per_prompt", "group_size")
            raise UserError(f"{self.path} was made with {shown} {found[different]}, not {wanted[different]}: {remedy}")

    def lock(self) -> FolderLock:
        """Makes the folder and locks it for this process. Raises UserError if another one is at work in it."""
        self.made_with()  # nothing is put into a folder that holds something else
        self.path.mkdir(parents=True, exist_ok=True)
        return FolderLock(self.path)

    def begin(self, made_with: JsonObject) -> None:
        """Notes what the pictures are made with."""
        self.require_same(made_with)
        _write(self.path / MADE_WITH, yaml.safe_dump(made_with, sort_keys=False, allow_unicode=True))
        (self.path / PICTURES).mkdir(exist_ok=True)

    def read_votes(self) -> None:
        """Reads the votes so far; a last line that a kill has cut short was never acknowledged, and goes.

        Raises UserError if a line is damaged, or if the preferences were changed by somebody else.
        """
        log, file = self.path / LOG, self.path / FILE
        lines = read_metrics(log) if log.is_file() else []
        for line in lines[:-1]:
            self._count(*self._read(line))
        known = [self._text()]  # a kill may have come before the file had the last vote
        for line in lines[-1:]:
            self._count(*self._read(line))
        if file.exists() and file.read_text(encoding="utf-8") not in [*known, self._text()]:
            raise UserError(
                f"{file}: was changed by something else than the page, which would undo that: move it to another folder"
            )
        if log.is_file():
            with log.open("rb+") as whole:
                whole.truncate(whole.read().rfind(b"\n") + 1)
            self._write_preferences()

    def add(self, vote: Vote) -> None:
        """Keeps a vote."""
        self._append(vote, undone=False)

    def undo(self) -> None:
        """Takes the last vote back; does nothing if there is none."""
        if self.votes:
            self._append(next(reversed(self.votes.values())), undone=True)

    def numbers(self, group: int) -> range:
        """The numbers of a group's pictures."""
        return range(group * self.group_size, (group + 1) * self.group_size)

    def picture(self, number: int) -> Path:
        """The file of a picture."""
        return self.path / PICTURES / f"{number:06d}.png"

    def drawn_groups(self) -> int:
        """How many groups, from the first on, have all their pictures."""
        groups = range(len(self.prompts))
        missing = (group for group in groups if not all(self.picture(one).is_file() for one in self.numbers(group)))
        return next(missing, len(self.prompts))

    def judged(self) -> int:
        """Number of groups with a vote that is no skip."""
        return sum(vote.said != "skip" for vote in self.votes.values())

    def _append(self, vote: Vote, *, undone: bool) -> None:
        line = {
            "group": vote.group,
            "said": vote.said,
            "values": list(vote.values),
            **({"undone": True} if undone else {}),
        }
        with (self.path / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
            log.flush()
            os.fsync(log.fileno())
        self._count(vote, undone)
        self._write_preferences()

    def _count(self, vote: Vote, undone: bool) -> None:
        self.votes.pop(vote.group, None)
        if not undone:
            self.votes[vote.group] = vote

    def _read(self, line: JsonObject) -> tuple[Vote, bool]:
        """A vote, and whether it is taken back."""
        try:
            vote = Vote(int(line["group"]), cast(Said, line["said"]), tuple(line["values"]))
            undone = bool(line.get("undone"))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.path / LOG}: a line is damaged; fix or remove it") from None
        if vote.group >= len(self.prompts):
            raise UserError(
                f"--groups {len(self.prompts)}: {self.path} has a vote on group {vote.group + 1}: ask for more"
            )
        return vote, undone

    def _write_preferences(self) -> None:
        _write(self.path / FILE, self._text())

    def _text(self) -> str:
        """`preferences.jsonl` by the votes."""
        records = (as_record(said, self.path) for vote in self.votes.values() for said in self._judgements(vote))
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def _judgements(self, vote: Vote) -> list[Judgement]:
        if vote.said == "skip":
            return []
        prompt = self.prompts[vote.group]
        prompt = replace(prompt, metadata={key: value for key, value in prompt.metadata.items() if key not in KEYS})
        images = [self.picture(number) for number in self.numbers(vote.group)]
        return [Judgement(prompt, vote.said, (image,), value) for image, value in zip(images, vote.values, strict=True)]


def _write(path: Path, text: str) -> None:
    """Writes a file in one step, on the disk before it is named."""
    staged = path.with_name(f".{path.name}")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
