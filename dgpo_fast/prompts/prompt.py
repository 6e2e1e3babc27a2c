"""What a prompt is: its text, what its rewards need to know about it, and where it came from."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from dgpo_fast.errors import UserError
from dgpo_fast.records import Metadata
from dgpo_fast.wording import one_line

T = TypeVar("T")
NEGATIVE_KEY = "negative_prompt"
"""Key of a prompt's metadata that gives its own negative prompt."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what the model is asked to draw.
        metadata: what a reward needs besides the text, e.g. GenEval's `include` list; never changed after creation.
        origin: where the prompt came from, e.g. `"prompts.txt:12"`; empty for generated prompts.
        negative: the negative prompt, from which guidance leads away; empty if there is none.
    """

    text: str
    metadata: Metadata = field(default_factory=dict, hash=False)
    origin: str = field(default="", compare=False)
    negative: str = ""

    @classmethod
    def from_json(cls, record: Sequence[Any]) -> Prompt:
        """What `to_json` gave."""
        text, metadata, *negative = record
        return cls(text, metadata, negative=negative[0] if negative else "")

    def to_json(self) -> list[Any]:
        """All but the origin, ready for JSON."""
        return [self.text, self.metadata, self.negative] if self.negative else [self.text, self.metadata]

    @property
    def tag(self) -> str:
        """The task the prompt belongs to, `"all"` if prompts have none; results are reported per tag."""
        return str(self.metadata.get("tag", "all"))

    @property
    def content(self) -> str:
        """What the prompt asks for, however it is worded: equal for GenEval prompts that differ in wording only."""
        if "include" not in self.metadata:
            return self.text
        return json.dumps([self.tag, self.metadata["include"]], sort_keys=True)


def digest(prompts: Iterable[Prompt]) -> str:
    """Tells lists of prompts apart by what they hold, in this order."""
    content = json.dumps([prompt.to_json() for prompt in prompts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def with_negative(prompts: list[Prompt], negative: str) -> list[Prompt]:
    """`prompts`, of which those without a negative prompt of their own get this one."""
    stays = (p.negative == negative or p.metadata.get(NEGATIVE_KEY) is not None for p in prompts)
    return [p if as_it_is else replace(p, negative=negative) for p, as_it_is in zip(prompts, stays, strict=True)]


TRAINING_PROMPTS, HELD_OUT = "training prompts", "held-out prompts"


@dataclass(frozen=True)
class PromptSets:
    """Prompts to train on and prompts to evaluate on; no prompt is in both unless `note` says so.

    Attributes:
        train: prompts to draw from uniformly. Repetitions are deliberate: they set the mix of tags.
        held_out: prompts for evaluation, one image each; distinct but for tags that have too few.
        note: one line that a user should see, or empty.
        evaluated: what `held_out` is, in a phrase: `TRAINING_PROMPTS` if they are no others.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    note: str = ""
    evaluated: str = HELD_OUT

    @property
    def everything(self) -> list[Prompt]:
        """The prompts of both."""
        return [*self.train, *self.held_out]


def without(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> list[Prompt]:
    """`prompts` less those that share their text or their content with one in `held_out`; order is kept."""
    held_out = list(held_out)
    texts, contents = {p.text for p in held_out}, {p.content for p in held_out}
    return [p for p in prompts if p.text not in texts and p.content not in contents]


def in_proportion(prompts: Iterable[Prompt], mix: Mapping[str, int]) -> list[Prompt]:
    """The shortest list that holds every prompt whose tag is in `mix`, and the tags in the proportions of `mix`.

    Prompts of a tag that has fewer than its share are repeated in turn.
    """
    by_tag: dict[str, list[Prompt]] = {tag: [] for tag in mix}
    for prompt in prompts:
        by_tag.get(prompt.tag, []).append(prompt)
    unit = max(math.ceil(len(by_tag[tag]) / weight) for tag, weight in mix.items())
    return [p for tag, weight in mix.items() for p in itertools.islice(itertools.cycle(by_tag[tag]), weight * unit)]


def in_turn(prompts: Iterable[T], tag_of: Callable[[T], str], count: int) -> list[T]:
    """`count` of the prompts, the tags in turn and each tag's prompts in order, over again if there are too few."""
    by_tag: dict[str, list[T]] = {}
    for prompt in prompts:
        by_tag.setdefault(tag_of(prompt), []).append(prompt)
    tags = sorted(by_tag)
    turns = (divmod(n, len(tags)) for n in range(count))
    return [by_tag[tags[k]][turn % len(by_tag[tags[k]])] for turn, k in turns]


DOUBLE_QUOTES = "“”„‟″＂"
"""Stand for `"`."""
_ANNOUNCED = re.compile(
    r"\b(?:says?|saying|said|reads?|reading|spells?|spelling|(?:en)?titled|labell?ed|called|named|written"
    r"|text|words?|phrase|letters|message|inscription|title)[\s:,]*\"([^\"]*)\"",
    re.IGNORECASE,
)


def quoted_text(text: str) -> str | None:
    """The words to be drawn: the double quotes after `says`, `reads`, `titled` and the like, else the first pair.

    None if there is no pair, if there is nothing in it, or if it is not clear which quotes are a pair: `a 12" ruler`.
    """
    words = "".join(quoted_texts(text)[:1])
    return words if words.strip() else None


def quoted_texts(text: str) -> list[str]:
    """The quoted texts of which `quoted_text` takes the first: that after `says` and the like, else all pairs."""
    text = text.translate(dict.fromkeys(map(ord, DOUBLE_QUOTES), '"'))
    announced = _ANNOUNCED.search(text)
    if announced:
        return [announced[1]]
    return [] if text.count('"') % 2 else text.split('"')[1::2]


def require_quoted_text(prompts: Iterable[Prompt]) -> None:
    """Raises UserError, naming file and line, for the first prompt without text between double quotes."""
    for prompt in prompts:
        if quoted_text(prompt.text) is None:
            unclear = "no pair of double quotes after a word such as says, and an odd number of them"
            odd = sum(map(prompt.text.count, f'"{DOUBLE_QUOTES}')) % 2
            raise UserError(
                f"{prompt.origin or 'prompt'}: {unclear if odd else 'no text between double quotes'} in "
                f'{shorten(prompt.text)}: write the words to be drawn like this: a sign that says "open"'
            )


def shorten(text: str, limit: int = 60) -> str:
    """`text` quoted on one line, cut to about `limit` characters, for messages."""
    line = one_line(text)
    return repr(line if len(line) <= limit else line[: limit - 1] + "…")
