"""Rewards by name, import path, judge file or server, with weights: `shapes`, `ocr=0.5`, `my_module:MyReward=2`,
`judge.yaml`, `http://127.0.0.1:8000=0.5`."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.protocol import Reward
from dgpo_fast.user_code import call, import_attribute

# One line per shipped reward; its module is imported when the reward is first asked for.
BUILT_IN = {
    "aesthetic": "dgpo_fast.rewards.shipped.aesthetic:AestheticReward",
    "clipscore": "dgpo_fast.rewards.shipped.clip:ClipScoreReward",
    "geneval-hf": "dgpo_fast.rewards.shipped.geneval:GenevalReward",
    "geneval-hf-compat": "dgpo_fast.rewards.shipped.geneval:compat",
    "hpsv2": "dgpo_fast.rewards.shipped.hpsv2:HpsReward",
    "imagereward": "dgpo_fast.rewards.shipped.imagereward:ImageRewardReward",
    "jpeg": "dgpo_fast.rewards.shipped.jpeg:JpegReward",
    "ocr": "dgpo_fast.rewards.shipped.ocr:OcrReward",
    "pickscore": "dgpo_fast.rewards.shipped.clip:PickScoreReward",
    "pixels": "dgpo_fast.rewards.shipped.pixels:PixelsReward",
    "shapes": "dgpo_fast.tiny.shapes:ShapesReward",
}


JUDGE_FILES = (".yaml", ".yml", ".json")
SERVERS = ("http://", "https://")


class Spec(NamedTuple):
    """One reward as it is named on the command line."""

    name: str
    source: str
    weight: float


def parse_spec(spec: str) -> Spec:
    """`"ocr=0.5"` → `("ocr", "ocr", 0.5)`; without a number at the end, the weight is 1. A weight may be negative.

    A reward that is not shipped may get a short name: `"taste=judge.yaml=2"` → `("taste", "judge.yaml", 2.0)`.
    """
    pieces = [piece.strip() for piece in spec.split("=")]
    weight = 1.0
    if len(pieces) > 1 and (number := _number(pieces[-1])) is not None:
        weight = number
        pieces.pop()
    name, source = pieces[0], pieces[-1]
    has_own_name = len(pieces) == 2 and name.isprintable() and (":" in source or source.endswith(JUDGE_FILES))
    shipped, colon, given = source.partition(":")
    if shipped in BUILT_IN and colon and _number(given) is not None:
        raise UserError(f"reward {spec!r}: a weight is written {shipped}={given}")
    if len(pieces) == 2 and source in BUILT_IN:
        raise UserError(f"reward {spec!r}: {source} is shipped and takes no short name: write {source} or {source}=0.5")
    if not name or not math.isfinite(weight) or not (len(pieces) == 1 or has_own_name):
        raise UserError(f"reward {spec!r}: write NAME or NAME=WEIGHT, for example ocr=0.5")
    return Spec(name, source, weight)


def parse_specs(specs: Sequence[str]) -> list[Spec]:
    """`parse_spec` of each. A weight separated from its reward by a space is an error."""
    parsed = [parse_spec(spec) for spec in specs]
    for before, spec in pairwise(parsed):
        if _number(spec.source) is not None:
            named = before.source if before.name == before.source else f"{before.name}={before.source}"
            raise UserError(f"no reward {spec.source!r}: a weight is written {named}={spec.source}, without a space")
    return parsed


def load_reward(name: str, source: str | None = None) -> Reward:
    """The reward `name`, ready to use and self-tested.

    Args:
        name: what it is called in messages.
        source: a shipped reward, `module:attribute`, a judge's settings (`judge.yaml`) or the address of a reward
            server; by default `name`. An attribute that is a class, or that takes no argument, is called to make the
            reward; one that takes images, prompts and metadata is the reward.

    Raises:
        UserError: one line, if there is no such reward, it cannot be made, or its self-test fails.
    """
    what = f"reward {name!r}"
    reward = _load(what, source or name)
    self_test = getattr(reward, "self_test", None)
    if self_test is not None:
        call(what, "failed its self-test", self_test)
    return reward


def fingerprint(source: str, reward: Reward) -> str | None:
    """Tells apart rewards with the same name: the reward's own `fingerprint`, or a hash of its module's file.

    None for shipped rewards, and if there is no such file.
    """
    own = getattr(reward, "fingerprint", None)
    if isinstance(own, str):
        return own
    module = None if source in BUILT_IN else sys.modules.get(source.partition(":")[0])
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def is_own(reward: Reward) -> bool:
    """Whether a reward is a user's own code. Those of this package test themselves."""
    return not getattr(reward, "__module__", "").startswith("dgpo_fast.")


def _load(what: str, source: str) -> Reward:
    if source.startswith(SERVERS):
        from dgpo_fast.rewards.remote.client import RemoteReward

        return RemoteReward(source)
    if source.endswith(JUDGE_FILES):
        from dgpo_fast.rewards.remote.judge import JudgeReward

        return JudgeReward.from_file(source)
    if ":" not in source and source not in BUILT_IN:
        close = _as_import(source) or difflib.get_close_matches(source, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"no reward {source!r}: {hint}Name one of {', '.join(BUILT_IN)}, or your own as module:attribute"
        )
    attribute = import_attribute(what, BUILT_IN.get(source, source), example="my_reward:Brightness")
    return _make(what, attribute)


def _as_import(source: str) -> list[str]:
    """`my_reward.Brightness` with the colon that it lacks."""
    module, _, attribute = source.rpartition(".")
    is_path = all(part.isidentifier() for part in source.split(".")) and attribute != "py"
    return [f"{module}:{attribute}"] if module and is_path else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _make(what: str, attribute: Callable[..., object]) -> Reward:
    needed = _needed(attribute) if inspect.isclass(attribute) else []
    if needed:
        raise UserError(
            f"{what}: a class is made without arguments: give {' and '.join(map(repr, needed))} a default, or name a "
            "function that returns the reward"
        )
    is_factory = inspect.isclass(attribute) or (_accepts(attribute, 0) and not _accepts(attribute, 3))
    reward = call(what, "cannot be made", attribute) if is_factory else attribute
    if not callable(reward) or not _accepts(reward, 3):
        raise UserError(f"{what}: must be callable as reward(images, prompts, metadata)")
    return cast(Reward, reward)


def _needed(function: Callable[..., object]) -> list[str]:
    """The names of the arguments that `function` cannot be called without, if they are known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        one.name
        for one in parameters
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]


def _accepts(function: Callable[..., object], arguments: int) -> bool:
    """Whether `function` can be called with this many positional arguments."""
    try:
        inspect.signature(function).bind(*range(arguments))
    except (TypeError, ValueError):
        return False
    return True
