"""Judges: vision-language models behind an OpenAI-compatible server (vLLM, SGLang, …) that score each picture.

A settings file has the judge's address, the question, and how to read the answer:

    url: http://127.0.0.1:8000/v1
    model: CodeGoat24/UnifiedReward-7b-v1.5
    preset: unifiedreward
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, Positive
from dgpo_fast.config.reading import read_yaml, resolve
from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject, Metadata
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.protocol import require_images
from dgpo_fast.rewards.remote import png
from dgpo_fast.rewards.remote.http_client import JsonClient, Unanswered

MAX_ALTERNATIVES = 20  # of a token, as many as OpenAI's interface gives
# Settings of how a judge is reached, which may change between two halves of a folder of scores.
_CHANGE_NO_SCORE = ("url", "api_key_variable", "requests_at_once", "deadline_s", "attempts", "self_test")


@dataclass(kw_only=True, config=STRICT)
class JudgeSettings:
    """Settings of a judge."""

    preset: Literal["unifiedreward", "deqa"] | None = None
    """Preset that the settings below start from. None: no preset."""
    url: str = ""
    """Address of the API, up to and including its version: `http://127.0.0.1:8000/v1`."""
    model: str = ""
    """The model's name on the server."""
    prompt: str = ""
    """The question; `{prompt}` is replaced by the picture's prompt."""
    image_first: bool = True
    """Send the picture before the question."""
    score: str | None = None
    """A regular expression whose one group is the score; its last match in the answer counts."""
    levels: dict[str, float] | None = None
    """Instead of `score`: words that the answer may contain, and their scores. The score is the mean of these,
    weighted by the judge's probabilities at the position of the first such word."""
    lowest: float = 1.0
    """Lower bound of the score. An answer outside the bounds is a failure."""
    highest: float = 5.0
    """Upper bound of the score."""
    divisor: Positive = 5.0
    """The reward is the score divided by this."""
    image_size: Count | None = None
    """Longest side, in pixels, that pictures are resized to. None: no resizing."""
    max_tokens: Count | None = 512
    """Maximum length of an answer, in tokens. None: not sent."""
    temperature: float | None = 0.0
    """Sampling temperature. None: not sent."""
    extra: str = ""
    """Additional fields of the request, as a JSON object: `{"seed": 0}`."""
    api_key_variable: str | None = None
    """Environment variable with the API key. The key is never written to a file."""
    requests_at_once: Annotated[int, Field(ge=1, le=256)] = 16
    """Number of pictures judged at a time."""
    deadline_s: Positive = 120.0
    """Seconds that one picture may take, including all attempts."""
    attempts: Count = 6
    """Maximum number of attempts for one picture if the judge is unavailable or too busy."""
    self_test: Literal["caption", "quality", "answer"] = "caption"
    """What is tested at the start. caption: the right caption beats a wrong one. quality: a photograph beats noise.
    answer: there is an answer that can be read."""


# UnifiedReward takes any wording of its task; this one is ours. It ends with what `score` looks for.
_UNIFIED_REWARD = (
    "Here is an image that was generated from a caption. Judge two things: how well the image shows what the caption "
    "says (the objects, their attributes and how they relate), and how good it looks (clear, detailed, true in colour, "
    "pleasing). Then give one score from 1 to 5 for both together after the words 'Final Score:'.\nCaption: [{prompt}]"
)

# Facts of the models: what they are asked, and what their answers look like.
PRESETS: dict[str, JsonObject] = {
    "unifiedreward": {"prompt": _UNIFIED_REWARD, "score": r"Final Score:\W*([0-9]+(?:\.[0-9]+)?)", "image_size": 512},
    # DeQA-Score answers "The quality of the image is good."; its score is the mean over the five words.
    "deqa": {
        "prompt": "How would you rate the quality of this image?",
        "image_first": False,
        "levels": {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0},
        "max_tokens": 16,
        "self_test": "quality",
    },
}


class JudgeReward:
    """The score that a judge gives each picture for its prompt, divided by `divisor`.

    Parts: `raw` (the judge's score before the division), `latency_s` and `attempts`. If a picture's answer is missing
    or cannot be read, its group fails.
    """

    independent_images = True
    metadata_keys = ()

    def __init__(self, settings: JudgeSettings) -> None:
        """Raises UserError if settings contradict each other, or if the key is missing."""
        self._settings = settings
        self._name = settings.model or "judge"
        _check(settings)
        self._pattern = re.compile(settings.score) if settings.score else None
        self._extra = _extra(settings.extra)
        deciding = {name: value for name, value in asdict(settings).items() if name not in _CHANGE_NO_SCORE}
        self.fingerprint = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
        self._client = JsonClient(
            settings.url, secret=_key(settings), deadline_s=settings.deadline_s, attempts=settings.attempts
        )
        # One bound on what the judge has to bear, whichever groups ask; groups may be as small as one picture.
        self.groups_at_once = settings.requests_at_once
        self._pool = ThreadPoolExecutor(settings.requests_at_once, thread_name_prefix="judge")

    @classmethod
    def from_file(cls, path: str | Path) -> JudgeReward:
        """A judge from its settings file, YAML or JSON. Raises UserError, one line that names file and setting."""
        given = read_yaml(Path(path))
        preset = given.get("preset")
        start = resolve(JudgeSettings(), PRESETS.get(preset, {}) if isinstance(preset, str) else {}, "preset")
        try:
            return cls(resolve(start, given, str(path)))
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores float32 (B,) and parts of uint8 images (B, H, W, 3); metadata are not used.

        Raises:
            UserError: images of another type or shape, or a key, model or address that the judge does not accept.
            Unanswered, ValueError: no answer in time, or one that cannot be read.
        """
        require_images(self._name, images)
        if not len(images):
            return np.zeros(0, np.float32), {}
        judged = list(self._pool.map(self._judge, images, prompts))
        raw, seconds, attempts = np.array(judged, np.float64).T
        parts = {"raw": raw, "latency_s": seconds, "attempts": attempts}
        return (raw / self._settings.divisor).astype(np.float32), {k: v.astype(np.float32) for k, v in parts.items()}

    def self_test(self) -> None:
        """Raises UserError unless the judge answers as `self_test` of its settings says it must."""
        squares = golden.squares()[[0, 2]]
        if not (png.decode_png(png.encode_png(squares[0]), squares[0].size) == squares[0]).all():
            raise UserError(f"judge {self._name!r} failed its self-test: a red square does not survive its PNG")
        try:
            if self._settings.self_test == "quality":
                self._compare_quality()
            else:
                self._compare_captions(squares, must_win=self._settings.self_test == "caption")
        except (Unanswered, ValueError) as error:
            raise UserError(f"judge {self._name!r} at {self._settings.url} failed its self-test: {error}") from None

    def _compare_captions(self, squares: np.ndarray, must_win: bool) -> None:
        texts = ["a red square", "a blue square"]
        right, _ = self(squares, texts, [{}] * 2)
        if must_win:
            wrong, _ = self(squares, texts[::-1], [{}] * 2)
            if not right.sum() > wrong.sum():
                seen = (
                    f"squares score {right.mean():.3f} with their own captions and {wrong.mean():.3f} with wrong ones"
                )
                raise ValueError(f"{seen}: wrong model or prompt?")

    def _compare_quality(self) -> None:
        (good, bad), _ = self(np.concatenate([golden.photo(), golden.noise()]), ["", ""], [{}] * 2)
        if not good > bad:
            raise ValueError(f"a photograph scores {good:.3f} and noise {bad:.3f}: wrong model or prompt?")

    def _judge(self, image: np.ndarray, prompt: str) -> tuple[float, float, float]:
        """Raw score of one picture, seconds and attempts."""
        body = json.dumps(self._request(image, prompt)).encode()
        try:
            reply = self._client.post("/chat/completions", body)
        except Unanswered as error:
            if error.status in (401, 403):
                source = self._settings.api_key_variable
                where = f"the key in {source} is refused" if source else "it wants a key: set api_key_variable"
                raise UserError(f"judge {self._name!r}: {where}") from None
            if error.status == 404:
                raise UserError(f"judge {self._name!r}: {self._settings.url} has no such model or address") from None
            raise
        return self._read(reply.content), reply.seconds, float(reply.attempts)

    def _request(self, image: np.ndarray, prompt: str) -> JsonObject:
        settings = self._settings
        data = base64.b64encode(png.encode_png(_resized(image, settings.image_size))).decode("ascii")
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        question = {"type": "text", "text": settings.prompt.replace("{prompt}", prompt)}
        content = [picture, question] if settings.image_first else [question, picture]
        request: JsonObject = {"model": settings.model, "messages": [{"role": "user", "content": content}]}
        optional = {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
        request |= {key: value for key, value in optional.items() if value is not None}
        if settings.levels:
            request |= {"logprobs": True, "top_logprobs": MAX_ALTERNATIVES}
        return request | self._extra

    def _read(self, answer: Any) -> float:
        """The score in a chat completion (any JSON). Raises ValueError if there is none between the bounds."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"no chat completion: {str(answer)[:80]}") from None
        if not isinstance(text, str):
            raise ValueError("an answer without text")
        if self._pattern and choice.get("finish_reason") == "length":
            raise ValueError(f"an answer cut at max_tokens {self._settings.max_tokens}: {text[-60:]!r}")
        score = self._from_levels(choice, text) if self._settings.levels else self._from_text(text)
        if not self._settings.lowest <= score <= self._settings.highest:
            raise ValueError(f"score {score:g} outside {self._settings.lowest:g} to {self._settings.highest:g}")
        return score

    def _from_text(self, text: str) -> float:
        found = self._pattern.findall(text) if self._pattern else []
        if not found:
            raise ValueError(f"no score in the answer {text[-80:]!r}")
        return float(found[-1])

    def _from_levels(self, choice: Mapping[str, Any], text: str) -> float:
        levels = self._settings.levels or {}
        try:
            tokens = choice["logprobs"]["content"]
            for token in tokens:
                if _word(token["token"]) in levels:
                    return _expected(token["top_logprobs"], levels)
        except (KeyError, TypeError):
            raise ValueError("an answer without probabilities: the server must support logprobs") from None
        raise ValueError(f"none of {', '.join(levels)} in the answer {text[:80]!r}")


def _expected(alternatives: Sequence[Mapping[str, Any]], levels: Mapping[str, float]) -> float:
    """Mean score of the levels among a token's alternatives, weighted with their probabilities."""
    weights: dict[str, float] = {}
    for one in alternatives:
        word = _word(one["token"])
        if word in levels:
            weights[word] = weights.get(word, 0.0) + math.exp(min(float(one["logprob"]), 0.0))
    total = sum(weights.values())
    if not total > 0:
        raise ValueError("the levels have no probability")
    return sum(levels[word] * weight for word, weight in weights.items()) / total


def _word(token: str) -> str:
    return token.strip().strip(".,;:!'\"▁ĠĊ").lower()


def _resized(image: np.ndarray, size: int | None) -> np.ndarray:
    height, width = image.shape[:2]
    if size is None or max(height, width) == size:
        return image
    scale = size / max(height, width)
    shape = max(round(width * scale), 1), max(round(height * scale), 1)
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def _check(settings: JudgeSettings) -> None:
    for name in ("url", "model", "prompt"):
        if not getattr(settings, name).strip():
            raise UserError(f"{name} is missing: a judge needs url, model and prompt")
    if (settings.score is None) == (settings.levels is None):
        raise UserError("give either score, a regular expression, or levels, words with their scores")
    if settings.levels is not None and (not settings.levels or any(w != _word(w) for w in settings.levels)):
        raise UserError("levels: write words in lower case, each with its score")
    if settings.score is not None:
        try:
            groups = re.compile(settings.score).groups
        except re.error as error:
            raise UserError(f"score: no regular expression ({error})") from None
        if groups != 1:
            raise UserError(f"score: needs one group in brackets, the number; it has {groups}")
    if settings.self_test == "caption" and "{prompt}" not in settings.prompt:
        raise UserError("prompt lacks {prompt}, so captions cannot matter: add it, or set self_test: quality")


def _extra(text: str) -> JsonObject:
    try:
        extra = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"extra: no JSON ({error})") from None
    if not isinstance(extra, dict):
        raise UserError('extra: no JSON object: write {"seed": 0}')
    return extra


def _key(settings: JudgeSettings) -> str | None:
    if settings.api_key_variable is None:
        return None
    key = os.environ.get(settings.api_key_variable)
    if not key:
        raise UserError(f"the environment variable {settings.api_key_variable} is not set: put the judge's key there")
    return key
