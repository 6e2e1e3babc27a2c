"""Preferences: what people said of pictures, in a `.jsonl` file or in folders. docs/preferences.md describes both.

A `Judgement` is one line: `read_preferences` reads a file or a folder, `append_judgement` writes a line, and
`groups_of` puts together what was said of a prompt's pictures. `require_pictures` and `read_picture` look at the
pictures themselves; nothing else here does.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image, ImageOps
from scipy.stats import rankdata

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.prompts.files import numbered_lines, parse_json, split_held_out
from dgpo_fast.prompts.prompt import NEGATIVE_KEY, Prompt, PromptSets, shorten
from dgpo_fast.records import JsonObject
from dgpo_fast.wording import one_line, size_in_words

PREFERENCES = "preferences"
"""What they are called among the things that a run depends on."""
FILE = "preferences.jsonl"
"""The file that a folder is read from."""
SIDES = {"liked": True, "disliked": False}
"""The folders that a folder without such a file has."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Kind = Literal["pair", "rating", "rank", "like"]
KEYS = ("image", "win", "lose", "rating", "rank", "like")
"""Keys of a line beside those of a prompt. All others are the prompt's metadata."""


@dataclass(frozen=True)
class Judgement:
    """What a person said of one picture, or of two: a line of the file.

    Attributes:
        prompt: what the pictures were drawn for; its origin is the line.
        kind: pair, rating, rank or like.
        images: the picture; of a pair, the better and the worse one.
        value: the rating; the rank, 1 being the best; 1 for a like and 0 for a dislike. A pair has none.
    """

    prompt: Prompt
    kind: Kind
    images: tuple[Path, ...]
    value: float = 1.0


@dataclass(frozen=True)
class JudgedGroup:
    """Pictures of one prompt with what was said of them.

    Attributes:
        prompt: its origin is the first line that says something of them.
        kind: of all the judgements.
        images: G different pictures.
        scores: one each, more is better: +1 and −1 of a pair or of likes and dislikes; the mean of a picture's ratings;
            from +1 for the first to −1 for the last rank, equal ranks in the middle of theirs.
    """

    prompt: Prompt
    kind: Kind
    images: tuple[Path, ...]
    scores: tuple[float, ...]


def read_preferences(source: str | Path) -> list[Judgement]:
    """All judgements of a `.jsonl` file, of the `preferences.jsonl` in a folder, or of its `liked/` and `disliked/`.

    Raises UserError: one line that names the file, its line and the remedy. Pictures are not opened.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        if (source / FILE).is_file():
            return _of_file(source / FILE)
        return _of_folders(source)
    if source.suffix != ".jsonl":
        raise UserError(f"{source}: preferences are a .jsonl file, or a folder: docs/preferences.md shows both")
    if not source.is_file():
        raise UserError(f"{source}: no such file: check the path (the working folder is {Path.cwd()})")
    return _of_file(source)


def append_judgement(file: Path, judgement: Judgement) -> None:
    """Writes a line at the end of `file`, which is made if there is none. Pictures are named relative to its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(as_record(judgement, file.parent), ensure_ascii=False) + "\n")


def as_record(judgement: Judgement, folder: Path) -> JsonObject:
    """What a line says in a file that lies in `folder`."""
    prompt = judgement.prompt
    record: JsonObject = {"prompt": prompt.text, **prompt.metadata}
    if prompt.negative:
        record[NEGATIVE_KEY] = prompt.negative
    names = [Path(os.path.relpath(image, folder)).as_posix() for image in judgement.images]
    if judgement.kind == "pair":
        return record | {"win": names[0], "lose": names[1]}
    value = judgement.value > 0 if judgement.kind == "like" else judgement.value
    if judgement.kind == "rank":
        value = int(value)
    return record | {"image": names[0], judgement.kind: value}


def groups_of(judgements: Iterable[Judgement]) -> list[JudgedGroup]:
    """Each pair, and the pictures of each prompt and kind, in the order in which they are first spoken of.

    What several lines say of one picture is averaged.
    """
    pairs: dict[object, list[Judgement]] = {}
    for number, judgement in enumerate(judgements):
        prompt = judgement.prompt
        key = (prompt.text, prompt.negative, judgement.kind, number if judgement.kind == "pair" else None)
        pairs.setdefault(key, []).append(judgement)
    return [_group(said) for said in pairs.values()]


Split = tuple[list[Judgement], list[Judgement], PromptSets]
"""Judgements to train on, those that are held out, and the prompts of both."""


def split_preferences(judgements: Sequence[Judgement], most: int) -> Split:
    """All that was said of a prompt stays together. A fifth of the prompts and `most` at most are held out, as
    `split_held_out` chooses them; if there are fewer than five, all are on both sides."""
    prompts = {judgement.prompt.text: judgement.prompt for judgement in reversed(judgements)}
    sets = split_held_out(list(reversed(prompts.values())), most)
    train, held_out = ({prompt.text for prompt in some} for some in (sets.train, sets.held_out))
    return (
        [judgement for judgement in judgements if judgement.prompt.text in train],
        [judgement for judgement in judgements if judgement.prompt.text in held_out],
        sets,
    )


def run_preferences(config: Config) -> Split:
    """`split_preferences` of what a run learns from, as many held-out prompts as it evaluates, with the negative prompt
    of those that have none. Raises UserError as `read_preferences`."""
    assert config.data.preferences is not None, "checked with the settings"
    negative = config.rollout.negative_prompt
    said = [
        replace(judgement, prompt=replace(judgement.prompt, negative=judgement.prompt.negative or negative))
        for judgement in read_preferences(config.data.preferences)
    ]
    return split_preferences(said, config.evaluation.images)


def check_run_preferences(config: Config, size: tuple[int, int]) -> dict[str, str]:
    """A digest of a run's judgements and their pictures by the name `PREFERENCES`; empty without `data.preferences`.

    Raises UserError as `require_pictures`.
    """
    if config.data.preferences is None:
        return {}
    said = read_preferences(config.data.preferences)
    require_pictures(said, size)
    records = [
        [each.prompt.to_json(), each.kind, each.value, *(picture_digest(image) for image in each.images)]
        for each in said
    ]
    return {PREFERENCES: hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()}


@cache
def picture_digest(image: Path) -> str:
    """Names a picture by its bytes. They are read once: a run goes on with the picture that it began with."""
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_pictures(judgements: Iterable[Judgement], size: tuple[int, int]) -> None:
    """Raises UserError, naming the line, for the first picture that is missing, broken or not of `size`, (height,
    width). Only what shows in a file without unpacking it is seen here."""
    seen: set[Path] = set()
    for judgement in judgements:
        for image in judgement.images:
            if image not in seen:
                seen.add(image)
                _require_picture(image, judgement.prompt.origin, size)


def read_picture(image: Path, origin: str) -> np.ndarray:
    """RGB, uint8 (height, width, 3), turned as its EXIF says; transparency is ignored. `origin` begins an error."""
    try:
        with Image.open(image) as picture:
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # a damaged file may raise anything in the decoder
        raise _unreadable(image, origin, error) from None


def _require_picture(image: Path, origin: str, size: tuple[int, int]) -> None:
    if not image.is_file():
        raise UserError(f"{origin}: no such picture: {image}: its path is read from the folder of the file")
    try:
        with Image.open(image) as picture:
            picture.verify()
        with Image.open(image) as picture:  # again: what was verified cannot be read
            turned = picture.getexif().get(0x0112, 1) > 4  # EXIF orientations that swap width and height
            found = picture.size if turned else picture.size[::-1]
    except Exception as error:
        raise _unreadable(image, origin, error) from None
    if found != size:
        raise UserError(
            f"{origin}: {image} has {size_in_words(*found)} and the run {size_in_words(*size)}: scale or crop the "
            f"picture, or use --rollout.resolution {found[0]}x{found[1]}"
        )


def _unreadable(image: Path, origin: str, error: Exception) -> UserError:
    return UserError(f"{origin}: {image} cannot be read ({one_line(error)}): save it again, as PNG or JPEG")


def _of_file(file: Path) -> list[Judgement]:
    found = [_judgement(line, f"{file}:{number}", file.parent) for number, line in numbered_lines(file)]
    if not found:
        raise UserError(
            f'{file}: holds no preferences: write lines such as {{"prompt": "…", "image": "…", "rating": 4}}'
        )
    return found


def _judgement(line: str, origin: str, folder: Path) -> Judgement:
    prompt = parse_json(line, origin)
    record = prompt.metadata
    own = {key: record[key] for key in KEYS if record.get(key) is not None}
    rest = {key: value for key, value in record.items() if key not in (*KEYS, "prompt", NEGATIVE_KEY)}
    prompt = replace(prompt, metadata=rest)
    if "win" in own or "lose" in own:
        return _pair(prompt, own, folder)
    said = [key for key in ("rating", "rank", "like") if key in own]
    if "image" not in own:
        raise UserError(f'{origin}: names no picture: write "image": "cat.png", or "win" and "lose"')
    if len(said) != 1:
        found = f"{' and '.join(said)} at once" if said else "nothing of the picture"
        raise UserError(f'{origin}: says {found}: write one of "rating": 4, "rank": 1 and "like": true')
    kind = cast(Kind, said[0])
    return Judgement(prompt, kind, (_path(own["image"], "image", origin, folder),), _value(kind, own[kind], origin))


def _pair(prompt: Prompt, own: dict[str, Any], folder: Path) -> Judgement:
    origin = prompt.origin
    for one, other in (("win", "lose"), ("lose", "win")):
        if other not in own:
            raise UserError(f'{origin}: has "{one}" without "{other}": a pair names both pictures')
    if len(own) > 2:
        raise UserError(f'{origin}: says more than a pair: write "win" and "lose" alone, and the rest on other lines')
    images = tuple(_path(own[key], key, origin, folder) for key in ("win", "lose"))
    if images[0] == images[1]:
        raise UserError(f'{origin}: "win" and "lose" are the same picture: name two, or remove the line')
    return Judgement(prompt, "pair", images)


def _path(given: object, key: str, origin: str, folder: Path) -> Path:
    if not isinstance(given, str) or not given.strip():
        raise UserError(f'{origin}: "{key}" is no file\'s name: write one, as in "{key}": "cat.png"')
    return Path(os.path.normpath(folder / Path(given).expanduser()))


def _value(kind: Kind, given: object, origin: str) -> float:
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if kind == "like":
        if isinstance(given, bool):
            return float(given)
        raise UserError(f'{origin}: "like" is {shorten(str(given))}: write true or false')
    if not is_number or not math.isfinite(cast(float, given)):
        raise UserError(f'{origin}: "{kind}" is {shorten(str(given))} and no number: write one, as in "{kind}": 4')
    if kind == "rank" and (given != int(cast(float, given)) or cast(float, given) < 1):
        raise UserError(f'{origin}: "rank" is {given}: write 1 for the best picture of the prompt, 2 for the next')
    return float(cast(float, given))


def _of_folders(folder: Path) -> list[Judgement]:
    """Of `liked/` and `disliked/`, where NAME.txt holds the prompt of NAME.png."""
    found: list[Judgement] = []
    for side, like in SIDES.items():
        for image in sorted((folder / side).glob("*")):
            if image.suffix.lower() in PICTURES:
                found.append(Judgement(_caption(image), "like", (image,), float(like)))
            elif image.suffix == ".txt" and not any(image.with_suffix(end).is_file() for end in PICTURES):
                raise UserError(f"{image}: a prompt without a picture: put {image.stem}.png beside it, or remove it")
    if not found:
        raise UserError(
            f"{folder}: holds neither {FILE} nor pictures in liked/ and disliked/: docs/preferences.md shows both"
        )
    return found


def _caption(image: Path) -> Prompt:
    text = image.with_suffix(".txt")
    lines = [line.strip() for _, line in numbered_lines(text)] if text.is_file() else []
    if not lines:
        raise UserError(f"{image}: has no prompt: write it into {text.name} beside it")
    return Prompt(" ".join(lines), {}, str(image))


def _group(said: Sequence[Judgement]) -> JudgedGroup:
    first = said[0]
    if first.kind == "pair":
        return JudgedGroup(first.prompt, "pair", first.images, (1.0, -1.0))
    values: dict[Path, list[float]] = {}
    for judgement in said:
        values.setdefault(judgement.images[0], []).append(judgement.value)
    scores = np.array([np.mean(of_one) for of_one in values.values()])
    if first.kind == "like":
        scores = 2 * scores - 1
    elif first.kind == "rank":
        count = len(scores)
        scores = (count + 1 - 2 * rankdata(scores)) / max(count - 1, 1)
    return JudgedGroup(first.prompt, first.kind, tuple(values), tuple(map(float, scores)))
