"""The `ocr` reward: does the picture show the words that the prompt asks for in quotes?

RapidOCR, which contains PaddleOCR's models as ONNX files, reads the words. With t the target, u what was read, both
normalised (`normalise`), and d their edit distance:

    r(t, u) = 1                           if t occurs in u
    r(t, u) = max(1 − d(t, u) / |t|, 0)   otherwise
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import DOUBLE_QUOTES, Prompt, quoted_text, require_quoted_text, shorten
from dgpo_fast.prompts.unread import unread_quotes
from dgpo_fast.records import Metadata
from dgpo_fast.rewards.protocol import require_images

# Pictures lower than this are a sign and little else, so one without a detected box is read as a single line of text.
SMALL_PICTURE = 64

_ALIKE = str.maketrans(
    {**dict.fromkeys("‘’‚‛ʼʹ′`´", "'"), **dict.fromkeys(DOUBLE_QUOTES, '"'), **dict.fromkeys("‐‑‒–—―−", "-")}
)
_ENGINE = {
    "Global.log_level": "critical",
    # Every picture is read by one thread, and several pictures at a time.
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    # Keeping freed memory for the next picture saves a tenth of the time for 30 MiB.
    "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
    # The paper's settings: no angle classifier, box threshold 0.6, unclip 1.5.
    "Global.use_cls": False,
    "Det.box_thresh": 0.6,
    "Det.unclip_ratio": 1.5,
    # Detection runs at the picture's own size, as PaddleOCR's does, and at 128 pixels if that is smaller. RapidOCR
    # would enlarge everything to 736 pixels: 2 (512 px) to 11 times (32 px) slower and no better
    # (benchmarks/ocr_accuracy.py).
    "Det.limit_type": "min",
    "Det.limit_side_len": 128,
    # Lines of text are padded to this width at least; the default of 320 only makes short words slower.
    "Rec.rec_img_shape": [3, 48, 160],
}


class OcrReward:
    """Reads each picture and compares it with the text that the prompt has in double quotes (`quoted_text`).

    Scores lie in [0, 1]. The part `exact` is 1 if the whole target was read. The score of a picture only
    depends on that picture and its prompt.
    """

    runs_on_cpu = True
    independent_images = True
    metadata_keys = ()

    def __init__(self, workers: int | None = None) -> None:
        """Loads the engine, in about a second.

        Args:
            workers: pictures read at a time; by default `OMP_NUM_THREADS`, or one per core of this process, eight at
                most.

        Raises:
            UserError: RapidOCR or onnxruntime is not installed.
        """
        try:
            import onnxruntime  # noqa: F401  (RapidOCR would only miss it at the first picture)
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError("reward 'ocr' needs RapidOCR: pip install 'rapidocr<4' onnxruntime") from error
        # RapidOCR declares four kinds of results for every call; a whole reading gives the one with texts and scores.
        self._engine: Any = RapidOCR(params=dict(_ENGINE))
        self._letters = set(map(normalise, self._engine._load_rec_model().postprocess_op.character))
        self._letters.update("".join(self._letters))  # of what one character is two letters, as of ½
        self._pool = ThreadPoolExecutor(workers or _default_threads(), thread_name_prefix="ocr")

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores float32 (B,) in [0, 1] of uint8 RGB images (B, H, W, 3).

        Raises:
            UserError: images of another type or shape, or a prompt without text between double quotes.
        """
        require_images("ocr", images)
        require_quoted_text(Prompt(text) for text in prompts)
        targets = [normalise(quoted_text(text) or "") for text in prompts]
        scores = [similarity(target, normalise(text)) for target, text in zip(targets, self.read(images), strict=True)]
        rewards = np.array(scores, np.float32)
        return rewards, {"exact": (rewards == 1).astype(np.float32)}

    def read(self, images: np.ndarray) -> list[str]:
        """The text on each of uint8 RGB images (B, H, W, 3), its lines joined from the top; "" if there is none."""
        return ["".join(texts) for texts, _ in self._pool.map(self._read_one, images)]

    def check_prompts(self, prompts: Sequence[Prompt]) -> str | None:
        """Raises UserError, with file and line, for a prompt without text between double quotes, or whose text has
        letters that the engine cannot read: its best possible score would be below 1.

        Returns a line on prompts that quote several texts, of which the first one is taken.
        """
        require_quoted_text(prompts)
        for prompt in prompts:
            words = quoted_text(prompt.text) or ""
            unread = "".join(dict.fromkeys(letter for letter in normalise(words) if letter not in self._letters))
            if unread:
                raise UserError(
                    f"{prompt.origin or 'prompt'}: reward 'ocr' cannot read {unread!r} in {shorten(words)}: leave "
                    "these letters out, or remove the line"
                )
        return unread_quotes(prompts)

    def self_test(self) -> None:
        """Raises UserError unless a printed word is read right, with the confidence that the engine has in it when it
        gets the colours in its own order, and nothing is read on a blank picture."""
        printed = _printed("Golden 42")
        texts, confidence = self._read_one(printed)
        blank = self.read(np.full((1, 96, 320, 3), 255, np.uint8))[0]
        if normalise("".join(texts)) != "golden42" or blank:
            seen = f"read {''.join(texts)!r} for 'Golden 42' and {blank!r} on a blank picture"
            raise UserError(f"reward 'ocr' failed its self-test: {seen}: reinstall rapidocr and onnxruntime")
        blue_green_red = np.ascontiguousarray(np.stack([printed[..., channel] for channel in (2, 1, 0)], -1))
        expected = self._engine(blue_green_red).scores
        if confidence != tuple(expected or ()):
            seen = f"read 'Golden 42' with confidence {confidence}, not {expected}"
            raise UserError(f"reward 'ocr' failed its self-test: {seen}: swapped colours?")

    def _read_one(self, image: np.ndarray) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """The lines of text on an RGB image (H, W, 3), from the top, and the engine's confidence in each."""
        bgr = as_engine_wants(image)
        found = self._engine(bgr)
        if not found.txts and len(image) < SMALL_PICTURE:
            found = self._engine.recognize_txt([bgr])
        return tuple(found.txts or ()), tuple(found.scores or ())


def as_engine_wants(image: np.ndarray) -> np.ndarray:
    """An RGB image (H, W, 3) with its channels in the order of OpenCV: blue, green, red."""
    return np.ascontiguousarray(image[..., ::-1])


def normalise(text: str) -> str:
    """`text` as targets and readings are compared: what looks alike is alike.

    Unicode's NFKC (one form of é, `％` and `…`), one kind of apostrophe, of double quote and of dash, without case and
    without white space and invisible marks, such as soft hyphens.
    """
    text = "".join(mark for mark in text if unicodedata.category(mark) != "Cf")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFC", text).translate(_ALIKE)).casefold()
    letters = "".join(unicodedata.normalize("NFKC", folded).translate(_ALIKE).split())
    # The small letter of İ is an i with one more dot above it, which no composed letter takes in.
    return unicodedata.normalize("NFC", letters.replace("\u0307", ""))


def similarity(target: str, text: str) -> float:
    """1 if `target` (not empty) occurs in `text`; else 1 − distance / length of `target`, and 0 at least."""
    if target in text:
        return 1.0
    return max(1 - edit_distance(target, text) / len(target), 0.0)


def edit_distance(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace to turn `a` into `b` (Levenshtein)."""
    distances = list(range(len(b) + 1))  # from the empty prefix of a to every prefix of b
    for row, letter in enumerate(a, 1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(b, 1):
            step = min(diagonal + (letter != other), distances[column] + 1, distances[column - 1] + 1)
            diagonal, distances[column] = distances[column], step
    return distances[-1]


def _default_threads() -> int:
    """What the environment allows, else the cores that a container or `taskset` leaves to this process."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit):
        return int(limit)
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _printed(text: str) -> np.ndarray:
    """`text` in red on green, uint8 (96, 320, 3)."""
    picture = Image.new("RGB", (320, 96), (20, 160, 40))
    ImageDraw.Draw(picture).text((24, 24), text, fill=(220, 20, 20), font=ImageFont.load_default(size=40))
    return np.asarray(picture)
