"""Rewards on another machine or in another environment, scored by `python -m dgpo_fast.reward_server`.

A request and its answer are JSON, with pictures as PNG files in base64: nothing that is sent can run code.

    GET  /health  → {"rewards": {"ocr": 1.0}, "independent_images": true, "fingerprints": {}, "queue": 0, …}
    POST /check   {"prompts": [{"text": …, "metadata": …, "origin": …}]} → {}, or status 422 and {"error": …}
    POST /check   {"images": […]} → {"means": [[red, green, blue], …]}, of the pictures as they arrived
    POST /score   {"prompt": …, "metadata": {…}, "images": […]}
                  → {"scores": […], "parts": {"ocr/exact": […]}, "queue": 2}

`/check` is optional. If a server answers it with 404, it is tested at the start by scoring golden pictures for the
run's first prompt. `independent_images` is optional too, see `Reward`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt, shorten
from dgpo_fast.records import JsonObject, Metadata
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.protocol import REWARD_KEY, not_finite, require_images
from dgpo_fast.rewards.remote import png
from dgpo_fast.rewards.remote.http_client import JsonClient, Reply, Unanswered

TOKEN_VARIABLE = "DGPO_REWARD_TOKEN"
_PROMPTS_PER_CHECK = 1000


class RemoteReward:
    """The score that a reward server gives, in its scale and with its parts.

    Parts of its own: `queue`, how many requests waited at the server when this one arrived, `latency_s` from the
    first attempt to the answer, and `attempts`.

    Attributes:
        independent_images: whether the server says so of what it runs, in `self_test`.
    """

    groups_at_once = 4
    independent_images = False

    def __init__(self, url: str, *, token: str | None = None, deadline_s: float = 120.0, attempts: int = 6) -> None:
        """
        Args:
            url: the server's address, `http://127.0.0.1:8000`.
            token: what the server was given under `--token-file`; by default the environment's DGPO_REWARD_TOKEN.
            deadline_s: seconds that a group of pictures may take, including all attempts.
            attempts: maximum number of attempts for a group if the server is unavailable or too busy.

        Raises:
            UserError: an invalid address or token.
        """
        self.fingerprint: str | None = None  # as the server says when it is tested
        self._url = url
        self._token = token or os.environ.get(TOKEN_VARIABLE) or None
        self._client = JsonClient(url, secret=self._token, deadline_s=deadline_s, attempts=attempts)

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores float32 (B,) and parts of uint8 images (B, H, W, 3), one request for each run of equal prompts.

        Raises:
            UserError: images of another type or shape, or a wrong set-up: the server refuses the token, the prompts or
                the pictures.
            Unanswered: no answer in time, or no usable one.
        """
        require_images(self._url, images)
        answers = []
        for start, end in _runs(prompts, metadata):
            request = {
                "prompt": prompts[start],
                "metadata": _without_choice(metadata[start]),
                "images": [_as_text(image) for image in images[start:end]],
            }
            answers.append(_read(self._ask("/score", request), end - start))
        if not answers:
            return np.zeros(0, np.float32), {}
        names = dict.fromkeys(name for _, parts in answers for name in parts)
        empty = {name: [parts.get(name, np.full(len(scores), np.nan)) for scores, parts in answers] for name in names}
        return (
            np.concatenate([scores for scores, _ in answers]),
            {name: np.concatenate(values) for name, values in empty.items()},
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Has the server check the prompts. Raises UserError, with file and line, if it cannot score one.

        A server without /check must score golden pictures for the first prompt instead.
        """
        for start in range(0, len(prompts), _PROMPTS_PER_CHECK):
            chunk = prompts[start : start + _PROMPTS_PER_CHECK]
            listed = [{"text": p.text, "metadata": _without_choice(p.metadata), "origin": p.origin} for p in chunk]
            if self._check({"prompts": listed}) is None:
                return self._try_out(chunk[0])

    def self_test(self) -> None:
        """Raises UserError unless the server answers, accepts the token, and receives pictures unchanged."""
        try:
            health = JsonClient(self._url, secret=self._token, deadline_s=10, attempts=1).get("/health").content
        except Unanswered as error:
            self._refuse(error)
            remedy = "start it with `python -m dgpo_fast.reward_server --reward NAME`, or fix the address"
            raise UserError(f"no reward server answers: {error}: {remedy}") from None
        if not isinstance(health, dict) or not isinstance(health.get("rewards"), dict):
            raise UserError(f"{self._url} is no reward server: its /health names no rewards")
        self.independent_images = health.get("independent_images") is True
        serves = json.dumps([health["rewards"], health.get("fingerprints")], sort_keys=True)
        self.fingerprint = hashlib.sha256(serves.encode()).hexdigest()
        squares = golden.squares()
        answer = self._check({"images": [_as_text(image) for image in squares]})
        if answer is None:
            return
        sent = squares.mean((1, 2))
        try:
            seen = np.array(answer["means"], np.float64)
            arrived = seen.shape == sent.shape and np.allclose(seen, sent, atol=0.01)
        except (KeyError, TypeError, ValueError):
            arrived = False
        if not arrived:
            raise UserError(f"{self._url} failed its self-test: coloured squares arrived changed")

    def _try_out(self, prompt: Prompt) -> None:
        """Raises UserError unless the server gives each golden picture a finite score for `prompt`."""
        squares = golden.squares()
        try:
            scores, _ = self(squares, [prompt.text] * len(squares), [prompt.metadata] * len(squares))
            seen = not_finite(scores)
            if seen is None:
                return
        except (Unanswered, ValueError, OverflowError) as error:
            seen = str(error)
        asked = f"{len(squares)} coloured squares and the prompt {shorten(prompt.text)}"
        raise UserError(f"{self._url} failed its self-test with {asked}: {seen}: fix its /score (docs/rewards.md)")

    def _check(self, request: JsonObject) -> Any:
        """The JSON of the server's /check, None if it has none. Raises UserError if it refuses or is lost."""
        try:
            return self._ask("/check", request).content
        except Unanswered as error:
            if error.status == 404:
                return None
            raise UserError(str(error)) from None

    def _ask(self, path: str, request: JsonObject) -> Reply:
        try:
            return self._client.post(path, json.dumps(request, allow_nan=False).encode())
        except Unanswered as error:
            self._refuse(error)
            raise

    def _refuse(self, error: Unanswered) -> None:
        """Raises UserError for errors that another attempt or other pictures would not fix."""
        if error.status in (401, 403):
            state = "refuses the token in" if self._token else "wants a token: put it into"
            raise UserError(f"reward server {self._url} {state} the environment variable {TOKEN_VARIABLE}") from None
        if error.status in (413, 422):
            raise UserError(f"reward server {self._url}: {error}" if error.status == 413 else str(error)) from None


def _runs(prompts: Sequence[str], metadata: Sequence[Metadata]) -> Iterator[tuple[int, int]]:
    """First and one past the last index of each stretch of equal prompts."""
    for _, members in groupby(range(len(prompts)), key=lambda index: (prompts[index], metadata[index])):
        stretch = list(members)
        yield stretch[0], stretch[-1] + 1


def _without_choice(metadata: Metadata) -> JsonObject:
    """Metadata without the names of rewards that score the prompt: these are the run's names, not the server's."""
    return {key: value for key, value in metadata.items() if key != REWARD_KEY}


def _read(reply: Reply, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scores and parts, float32 (size,), of the server's answer. Raises ValueError for an answer of another form."""
    answer = reply.content
    if not isinstance(answer, dict) or "scores" not in answer:
        raise ValueError(f"an answer without scores: {str(answer)[:60]}")
    parts = answer.get("parts", {})
    if not isinstance(parts, dict):
        raise ValueError('"parts" is no object')
    found = {str(name): _numbers(values, size, f"part {name!r}", or_null=True) for name, values in parts.items()}
    waiting = answer.get("queue")
    own = {"latency_s": reply.seconds, "attempts": float(reply.attempts)}
    if isinstance(waiting, int | float):
        own["queue"] = float(waiting)
    found |= {name: np.full(size, value, np.float32) for name, value in own.items()}
    return _numbers(answer["scores"], size, "scores"), found


def _numbers(values: object, size: int, what: str, or_null: bool = False) -> np.ndarray:
    """A JSON list of `size` numbers as float32. If allowed, null becomes NaN."""
    if not isinstance(values, list) or len(values) != size:
        got = f"{len(values)} numbers" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"{what}: {got} for {size} pictures")
    if not all(_is_number(value) or (or_null and value is None) for value in values):
        raise ValueError(f"{what}: no numbers: {str(values)[:60]}")
    with np.errstate(over="ignore"):
        return np.array([np.nan if value is None else float(value) for value in values], np.float64).astype(np.float32)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_text(image: np.ndarray) -> str:
    return base64.b64encode(png.encode_png(image)).decode("ascii")
