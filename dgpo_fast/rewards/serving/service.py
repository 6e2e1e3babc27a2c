"""Handles requests of a reward server, independent of the transport: checks, the queue, and one scoring worker."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt
from dgpo_fast.records import JsonObject, refuse_constant
from dgpo_fast.rewards.remote import png
from dgpo_fast.rewards.weighted import WeightedReward
from dgpo_fast.wording import one_line

Work = Callable[[bytes], JsonObject]


class Refused(Exception):
    """A request that is not answered, with the HTTP status and one line that say why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Limits of requests."""

    images: int
    """Of one request."""
    pixels: int
    """Of all images of one request."""
    waiting: int
    """Number of requests, including the one that is being scored."""
    deadline_s: float
    """Seconds from a request's arrival to its answer."""


@dataclass
class Counts:
    """What a server has done so far."""

    scored: int = 0
    failed: int = 0
    refused: int = 0
    images: int = 0
    scoring_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **numbers: float) -> None:
        """Adds to the named counts."""
        with self.lock:
            for name, number in numbers.items():
                setattr(self, name, getattr(self, name) + number)

    def line(self) -> str:
        """All counts, to print."""
        return f"{self.scored} requests scored ({self.images} images), {self.failed} failed, {self.refused} refused"


class RewardService:
    """Scores one request at a time, in the order of their arrival, in a thread of its own."""

    def __init__(self, reward: WeightedReward, limits: Limits):
        self.reward, self.limits, self.counts = reward, limits, Counts()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._waiting = 0
        self._closing = False
        self._began: float | None = None

    @property
    def busy_s(self) -> float:
        """Seconds that the current request has been scored for; 0 if there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def health(self) -> JsonObject:
        """The server's rewards, limits, queue and counts."""
        counts = self.counts
        return {
            "rewards": self.reward.weights,
            "independent_images": self.reward.dependent_images is None,
            "fingerprints": self.reward.fingerprints,
            "queue": self._waiting,
            "scored": counts.scored,
            "failed": counts.failed,
            "refused": counts.refused,
            "images": counts.images,
            "scoring_s": round(counts.scoring_s, 3),
            "limits": {"images": self.limits.images, "pixels": self.limits.pixels},
        }

    async def answer(self, path: str, body: bytes, is_gone: Callable[[], bool]) -> JsonObject:
        """The answer to a request at `path`, after those that came before it.

        Args:
            path: "/score" or "/check".
            body: JSON, from anyone.
            is_gone: whether the client has given up; its request is then left out.

        Raises:
            Refused: whatever else happens.
        """
        work = {"/score": self._score, "/check": self._check}[path]
        if self._closing or self._waiting >= self.limits.waiting:
            state = "closing" if self._closing else f"busy with {self._waiting} requests"
            raise Refused(503, f"the reward server is {state}")
        queue, self._waiting = self._waiting, self._waiting + 1
        future = asyncio.wrap_future(self._worker.submit(self._work, work, body, is_gone))
        try:
            await asyncio.wait([future], timeout=self.limits.deadline_s)
            if future.cancelled():
                raise Refused(503, "the reward server is closing")
            if not future.done():
                raise Refused(504, f"no score within {self.limits.deadline_s:g} s")
            return {**future.result(), "queue": queue}
        finally:
            future.cancel()
            self._waiting -= 1

    async def close(self) -> None:
        """Finishes the request that is being scored and refuses all others."""
        self._closing = True
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)

    def _work(self, work: Work, body: bytes, is_gone: Callable[[], bool]) -> JsonObject:
        if is_gone():
            raise Refused(499, "the client has gone")
        self._began = time.monotonic()
        try:
            return work(body)
        finally:
            self._began = None

    def _score(self, body: bytes) -> JsonObject:
        request = _parsed(body)
        prompt = _prompt(request.get("prompt"), request.get("metadata", {}))
        images = self._images(request)
        started = time.monotonic()
        try:
            scores = self.reward.score_groups(images, [prompt], len(images))
        except UserError as error:
            raise Refused(422, str(error)) from None
        self.counts.add(scoring_s=time.monotonic() - started, images=len(images))
        if scores.failures:
            self.counts.add(failed=1)
            raise Refused(500, "; ".join(scores.failures)[:1000])
        self.counts.add(scored=1)
        parts = {name: _or_null(values[0]) for name, values in scores.parts.items()}
        return {"scores": scores.rewards[0].tolist(), "parts": parts}

    def _check(self, body: bytes) -> JsonObject:
        request = _parsed(body)
        listed = request.get("prompts", [])
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise Refused(400, '"prompts" is no list of objects')
        prompts = [_prompt(one.get("text"), one.get("metadata", {}), one.get("origin", "")) for one in listed]
        try:
            self.reward.check_prompts(prompts)
        except UserError as error:
            raise Refused(422, str(error)) from None
        return {"means": self._images(request).mean((1, 2)).tolist()} if "images" in request else {}

    def _images(self, request: JsonObject) -> np.ndarray:
        """uint8 (B, H, W, 3), B ≥ 1, out of base64."""
        encoded = request.get("images")
        if not isinstance(encoded, list) or not encoded or not all(isinstance(one, str) for one in encoded):
            raise Refused(400, '"images" is no list of PNG files in base64')
        if len(encoded) > self.limits.images:
            raise Refused(413, f"{len(encoded)} images, more than --max-images {self.limits.images}")
        images: list[np.ndarray] = []
        left = self.limits.pixels
        for number, one in enumerate(encoded):
            try:
                images.append(png.decode_png(base64.b64decode(one, validate=True), left))
            except png.TooLarge as error:
                limit = f"--max-megapixels {self.limits.pixels / 1e6:g}"
                raise Refused(413, f"image {number}: {error} that are left of {limit}") from None
            except (ValueError, binascii.Error) as error:
                raise Refused(400, f"image {number}: {error}") from None
            left -= images[-1].shape[0] * images[-1].shape[1]
        if len({image.shape for image in images}) > 1:
            raise Refused(400, "the images differ in size")
        return np.stack(images)


def _parsed(body: bytes) -> JsonObject:
    try:
        request = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"no JSON: {one_line(error)[:100]}") from None
    if not isinstance(request, dict):
        raise Refused(400, "no JSON object")
    return request


def _prompt(text: object, metadata: object, origin: object = "") -> Prompt:
    if not isinstance(text, str) or not isinstance(metadata, dict) or not isinstance(origin, str):
        raise Refused(400, "a prompt is a text with an object of metadata")
    return Prompt(text, metadata, origin)


def _or_null(values: np.ndarray) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]
