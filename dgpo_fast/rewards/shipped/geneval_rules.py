"""GenEval's rules (Ghosh et al. 2023): from the objects found in a picture to its scores. No model is involved.

Metadata is GenEval's: `include`, a list of {"class", "count", "color"?, "position"?: [relation, index of an earlier
entry]}, all of which must be met, and `exclude`, a list of {"class", "count"}, none of which may be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dgpo_fast.records import Metadata

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_PER_CLASS = 16
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Directions (x, y) in pixels; y points down."""

Rule = Literal["fixed", "compat"]


class Placed(Protocol):
    """Anything with a place in the picture, in pixels."""

    @property
    def centre(self) -> tuple[float, float]: ...

    @property
    def size(self) -> tuple[float, float]: ...


@dataclass(frozen=True, eq=False)
class Detection:
    """One object that a detector saw.

    Attributes:
        name: its class.
        confidence: in [0, 1].
        box: left, top, right, bottom in pixels; right and bottom lie one past the last pixel.
        mask: bool (H, W); None if no colours are asked for.
        color: its colour, "" if it was not determined.
    """

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None
    color: str = ""

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def size(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return right - left, bottom - top


class Matched(NamedTuple):
    """What was found for one entry of `include`: objects of its class, and those of them in its colour, if it has one.

    Both lists are in order of confidence.
    """

    wanted: Mapping[str, Any]
    objects: Sequence[Placed]
    in_color: Sequence[Placed]

    @property
    def exact(self) -> bool:
        return len(self.objects) == self.wanted["count"]


class Scores(NamedTuple):
    """A picture's graded score, and whether it is correct (official) and strictly correct (exact counts)."""

    graded: float
    correct: bool
    strict: bool


def keep(detections: Sequence[Detection], tag: str) -> list[Detection]:
    """Detections that count, most confident first: above 0.3, or 0.9 for the tag `counting`, at most 16 per class."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.confidence):
        same = sum(other.name == detection.name for other in kept)
        if detection.confidence > threshold and same < MAX_PER_CLASS:
            kept.append(detection)
    return kept


def score(found: Sequence[Detection], metadata: Metadata, rule: Rule = "fixed") -> Scores:
    """Scores of a picture in which `found` was kept, most confident first, with colours if metadata asks for them.

    Correct, as GenEval's authors evaluate: every entry has at least `count` objects, the `count` most confident of them
    are all in its colour and all in the relation to all of the entry that its position names, which must itself be met;
    and no entry of `exclude` is reached. Strict: correct with exactly `count` objects of every entry.

    Graded: `graded` for the rule "fixed", `graded_compat` for "compat".
    """
    matched = []
    for wanted in metadata["include"]:
        objects = [one for one in found if one.name == wanted["class"]]
        in_color = [one for one in objects if one.color == wanted.get("color", one.color)]
        matched.append(Matched(wanted, objects, in_color))
    correct = _all_met(found, metadata["include"])
    for unwanted in metadata.get("exclude", ()):
        correct = correct and sum(one.name == unwanted["class"] for one in found) < unwanted["count"]
    grade = graded if rule == "fixed" else graded_compat
    return Scores(grade(matched), correct, correct and all(one.exact for one in matched))


def graded(matched: Sequence[Matched]) -> float:
    """The mean over the terms of all entries, in [0, 1].

    - count: max(1 − |found − count| / count, 0);
    - colour, if asked for: the same for the objects in that colour, 0 if the count is wrong;
    - position, if asked for: the share of pairs in the relation, 0 if the count is wrong. Pairs are of the `count`
      first objects of either entry, in their colour if they have one.
    """
    terms = []
    first = [one.in_color[: one.wanted["count"]] for one in matched]
    for index, one in enumerate(matched):
        count = one.wanted["count"]
        terms.append(max(0.0, 1 - abs(len(one.objects) - count) / count))
        if "color" in one.wanted:
            terms.append(max(0.0, 1 - abs(len(one.in_color) - count) / count) if one.exact else 0.0)
        if "position" in one.wanted:
            terms.append(share_in_relation(first, index, one.wanted["position"]) if one.exact else 0.0)
    return float(np.mean(terms))


def graded_compat(matched: Sequence[Matched]) -> float:
    """The mean that Flow-GRPO's and DGPO's release trains on, with its peculiarities.

    Unlike `graded`: a count's term is negative beyond twice the count; colour and position share one 0 if the count
    is wrong; position has no term if the colour is wrong; it is 0 if the entry it relates to is not met exactly;
    and a failed position counts as two terms, 0 and 1.
    """
    terms: list[float] = []
    met: list[bool] = []
    first = [one.objects for one in matched]
    for index, (wanted, objects, in_color) in enumerate(matched):
        count = wanted["count"]
        terms.append(1 - abs(len(objects) - count) / count)
        ok = len(objects) == count
        if not ok and ("color" in wanted or "position" in wanted):
            terms.append(0.0)
        if ok and "color" in wanted:
            terms.append(1 - abs(len(in_color) - count) / count)
            ok = len(in_color) == count
        if ok and "position" in wanted:
            to_met = met[wanted["position"][1]]
            ok = to_met and share_in_relation(first, index, wanted["position"]) == 1
            terms += [1.0] if ok else [0.0, 1.0] if to_met else [0.0]
        met.append(ok)
    return float(np.mean(terms))


def relations(a: Placed, b: Placed) -> set[str]:
    """The relations of `a` to `b`: those along which the offset of their centres, less a tenth of both sizes, is more
    than half of the offset's length. Two at most; none if they are too close."""
    offset = np.subtract(a.centre, b.centre)
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * np.add(a.size, b.size), 0)
    length = float(np.hypot(*offset))
    return {name for name, axis in RELATIONS.items() if float(shrunk @ np.array(axis)) > 0.5 * length}


def _all_met(found: Sequence[Detection], include: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first `count` objects of every entry are there, in its colour and in its relation."""
    first = [[one for one in found if one.name == wanted["class"]][: wanted["count"]] for wanted in include]
    for index, wanted in enumerate(include):
        objects = first[index]
        in_color = all(one.color == wanted.get("color", one.color) for one in objects)
        if len(objects) < wanted["count"] or not in_color:
            return False
        if "position" in wanted and share_in_relation(first, index, wanted["position"]) < 1:
            return False
    return True


def share_in_relation(groups: Sequence[Sequence[Placed]], index: int, position: tuple[str, int]) -> float:
    """Of the pairs of group `index` and the group that `position` names, the share in its relation; 0 without pairs."""
    relation, other = position
    holds = [relation in relations(a, b) for a in groups[index] for b in groups[other]]
    return sum(holds) / len(holds) if holds else 0.0
