"""Prompts in GenEval's grammar: six tasks over the 80 COCO classes, with the metadata that its scoring rules read.

The grammar in one table, where A and B are classes, c and d colours and n two to four:

    single_object   a photo of an A
    two_object      a photo of an A and a B
    counting        a photo of n As
    colors          a photo of a c A
    position        a photo of an A left of a B       (right of, above, below)
    color_attr      a photo of a c A and a d B        (c and d differ)
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt, PromptSets, in_proportion, shorten, without
from dgpo_fast.records import JsonObject, Metadata

# Three COCO names are ambiguous in a prompt; GenEval writes "computer mouse", "tv remote" and "computer keyboard".
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# How often each task is trained; a lone object is what every model can draw, so it is only evaluated.
TRAINING_MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}

# Classes that English counts by a measure ("two pairs of skis"), and plurals that take more than an ending.
_MEASURES = {"skis": "pair", "scissors": "pair", "broccoli": "head"}
_IRREGULAR_PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}

_COLORABLE = tuple(name for name in CLASSES if name != "person")
_OBJECT_PAIRS = tuple(itertools.permutations(CLASSES, 2))
_COLORABLE_PAIRS = tuple(itertools.permutations(_COLORABLE, 2))
_COLOR_PAIRS = tuple(itertools.permutations(COLORS, 2))

# What each task may combine: one choice out of every list gives one prompt.
_CHOICES: dict[str, tuple[Sequence[Any], ...]] = {
    "single_object": (CLASSES,),
    "two_object": (_OBJECT_PAIRS,),
    "counting": (CLASSES, tuple(COUNTS)),
    "colors": (_COLORABLE, COLORS),
    "position": (_OBJECT_PAIRS, RELATIONS),
    "color_attr": (_COLORABLE_PAIRS, _COLOR_PAIRS),
}


def geneval_prompts(held_out: int = 256, per_weight: int = 2000, seed: int = 0) -> PromptSets:
    """About 34,000 training prompts in the training mix and `held_out` others, spread evenly over the six tags.

    Args:
        held_out: number of evaluation prompts. They do not depend on `seed`. A trained tag gives a fifth of its
            distinct prompts at most, so very large requests return fewer.
        per_weight: training prompts per unit of the mix, whose weights sum to 17.
        seed: of the training prompts.

    `counting` has 240 distinct prompts in all, so its share of the mix repeats them, each about equally often.
    """
    evaluation: list[Prompt] = []
    for index, tag in enumerate(TAGS):
        share = held_out // len(TAGS) + (index < held_out % len(TAGS))
        limit = prompt_count(tag) // (5 if tag in TRAINING_MIX else 1)
        evaluation += _sample(tag, min(share, limit), random.Random(f"held-out {tag}"))
    train: list[Prompt] = []
    for tag, weight in TRAINING_MIX.items():
        wanted = weight * per_weight
        pool = without(_sample(tag, wanted + len(evaluation), random.Random(f"{seed} {tag}")), evaluation)
        train += pool[:wanted]
    train = in_proportion(train, TRAINING_MIX)
    random.Random(f"{seed} order").shuffle(train)
    return PromptSets(train=train, held_out=evaluation)


def prompt_count(tag: str) -> int:
    """The number of distinct prompts of one tag."""
    return math.prod(map(len, _CHOICES[tag]))


def geneval_prompt(tag: str, index: int) -> Prompt:
    """Prompt number `index` of a tag, 0 ≤ index < `prompt_count(tag)`; different numbers give different prompts."""
    chosen = []
    for options in _CHOICES[tag]:
        index, position = divmod(index, len(options))
        chosen.append(options[position])
    phrase, metadata = _describe(tag, chosen)
    text = f"a photo of {phrase}"
    return Prompt(text, {"tag": tag, **metadata, "prompt": text})


def require_geneval_metadata(prompts: Iterable[Prompt]) -> None:
    """Raises UserError, naming file and line, for the first prompt whose metadata does not follow GenEval's format.

    Which classes, colours and relations exist is for each reward to say.
    """
    for prompt in prompts:
        problem = _problem(prompt.metadata)
        if problem:
            example = '{"prompt": "…", "tag": "counting", "include": [{"class": "cat", "count": 2}]}'
            raise UserError(
                f"{prompt.origin or shorten(prompt.text)}: {problem}: write GenEval metadata such as {example}"
            )


def require_known(reward: str, prompts: Iterable[Prompt], known: Mapping[str, Collection[str]]) -> None:
    """Raises UserError, naming file and line, for the first prompt that asks for what a reward cannot find.

    Args:
        reward: its name, for the message.
        prompts: with GenEval's metadata.
        known: what "class", "color" and "position" (the relation) may be.
    """
    for prompt in prompts:
        include, exclude = prompt.metadata["include"], prompt.metadata.get("exclude", [])
        related = [{**entry, "position": entry["position"][0]} if "position" in entry else entry for entry in include]
        for asked in related + [{"class": entry["class"]} for entry in exclude]:
            for key in known:
                if key in asked and asked[key] not in known[key]:
                    are_coco = known[key] is CLASSES
                    names = "COCO's 80 classes in GenEval's spelling" if are_coco else ", ".join(known[key])
                    place = prompt.origin or shorten(prompt.text)
                    raise UserError(f"{place}: reward {reward!r} has no {key} {asked[key]!r}: use one of {names}")


def require_tags(reward: str, prompts: Iterable[Prompt]) -> None:
    """Raises UserError, naming file and line, for the first tag that is one of the six but for its spelling.

    `Counting` or `colour-attrs` would pass for a tag of the user's own, and be scored by another threshold.
    """
    known = {_letters(tag): tag for tag in TAGS}
    for prompt in prompts:
        tag = str(prompt.metadata.get("tag", ""))
        meant = known.get(_letters(tag), tag)
        if meant != tag:
            place = prompt.origin or shorten(prompt.text)
            raise UserError(
                f"{place}: reward {reward!r} has no tag {tag!r}: write {meant!r}, or name a tag of your own differently"
            )


def with_article(name: str, color: str = "") -> str:
    """`"a cat"`, `"an orange cat"`, `"a black pair of skis"`."""
    noun = f"{_MEASURES[name]} of {name}" if name in _MEASURES else name
    words = f"{color} {noun}".strip()
    # By letter is by sound for these classes and colours: none starts like "hour" or "unicorn".
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """`"cats"`, `"buses"`, `"knives"`, `"pairs of skis"`."""
    if name in _MEASURES:
        return f"{_MEASURES[name]}s of {name}"
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _sample(tag: str, size: int, rng: random.Random) -> list[Prompt]:
    """`size` distinct prompts of a tag in random order, or all of them if there are fewer."""
    total = prompt_count(tag)
    return [geneval_prompt(tag, index) for index in rng.sample(range(total), min(size, total))]


def _describe(tag: str, chosen: list[Any]) -> tuple[str, JsonObject]:
    """What follows "a photo of", and GenEval's `include` and `exclude`, for one choice out of each list of the tag."""
    match tag, chosen:
        case "single_object", [name]:
            return with_article(name), {"include": [_wanted(name)]}
        case "two_object", [(a, b)]:
            return f"{with_article(a)} and {with_article(b)}", {"include": [_wanted(a), _wanted(b)]}
        case "counting", [name, count]:
            more = {"class": name, "count": count + 1}
            return f"{COUNTS[count]} {plural(name)}", {"include": [{"class": name, "count": count}], "exclude": [more]}
        case "colors", [name, color]:
            return with_article(name, color), {"include": [_wanted(name, color=color)]}
        case "position", [(a, b), relation]:
            # GenEval lists the landmark first: `position` holds the relation and the landmark's index in `include`.
            located = _wanted(a, position=[relation, 0])
            return f"{with_article(a)} {relation} {with_article(b)}", {"include": [_wanted(b), located]}
        case "color_attr", [(a, b), (color_a, color_b)]:
            both = [_wanted(a, color=color_a), _wanted(b, color=color_b)]
            return f"{with_article(a, color_a)} and {with_article(b, color_b)}", {"include": both}
    raise ValueError(f"no such tag: {tag}")


def _wanted(name: str, **attributes: object) -> JsonObject:
    return {"class": name, "count": 1, **attributes}


def _problem(metadata: Metadata) -> str | None:
    """What is wrong with a prompt's metadata, in a few words, or None."""
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    if not isinstance(include, list) or not include:
        return 'no list "include" of what to draw'
    if not isinstance(exclude, list):
        return '"exclude" is no list'
    for entry in include + exclude:
        if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
            return 'an entry without "class"'
        if not _is_int(entry.get("count")) or entry["count"] < 1:
            return f'"count" of {entry["class"]!r} is no number from 1 up'
        if not isinstance(entry.get("color", ""), str):
            return f'"color" of {entry["class"]!r} is no name'
    for index, entry in enumerate(include):
        if "position" not in entry or _is_position(entry["position"], index):
            continue
        return f'"position" of {entry["class"]!r} is no pair of a relation and the number of an earlier entry'
    return None


def _is_position(value: object, index: int) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    relation, other = value
    return isinstance(relation, str) and _is_int(other) and 0 <= other < index


def _letters(tag: str) -> str:
    """What is left of a tag without case, plurals and what its words are joined by, and in American spelling."""
    words = re.split(r"[\W_]+", tag.lower().replace("colour", "color"))
    return "".join(word.removesuffix("s") for word in words)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
