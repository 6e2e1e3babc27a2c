"""What a reward is, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.records import Metadata

REWARD_KEY = "reward"
"""Key of a prompt's metadata that names the rewards that score it."""


class Reward(Protocol):
    """Scores images against their prompts; a class, a function or any other callable of this shape is one.

    Two methods and five attributes are optional:

    - `check_prompts(prompts: Sequence[Prompt]) -> None` refuses, with a `UserError`, prompts that cannot be scored.
      It is called once, before anything is drawn.
    - `self_test() -> None` raises if the reward does not work here, e.g. by scoring an image whose score is known. It
      is called once, when the reward is loaded.
    - `groups_at_once: int`, for a reward that waits for another machine: it is then called from so many threads at a
      time, each with the images of another prompt.
    - `runs_on_cpu = True` says that scoring takes no GPU and depends on the arguments alone. Such a reward may be
      loaded again in worker processes, which score several groups at a time beside the rollout.
    - `independent_images = True` says that a picture's score does not depend on the pictures beside it, so that
      several processes, workers or trainers, may share a group. A run with fewer groups than processes needs it.
    - `needs_real_pictures = True` says that it cannot score coloured squares, on which a user's own reward is tried out
      before a run.
    - `fingerprint: str` tells rewards apart that may be behind one name: kept scores are gone on with under the same
      one only. Without it, the file of a user's module does.
    """

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores B images; they are the images of one prompt when a trainer asks.

        Args:
            images: uint8 (B, H, W, 3), RGB in 0..255. A copy: the reward may change it.
            prompts: B texts.
            metadata: B dictionaries of what the prompt's source said beside the text, e.g. GenEval's `include`.

        Returns:
            Scores, floats (B,), higher is better; or `(scores, parts)`, where each of `parts` is (B,) and only logged.
            Lists and tensors do as well. A score that is not finite, or an exception, drops the prompt's group of
            images from the step.
        """
        ...


def not_finite(scores: np.ndarray) -> str | None:
    """Of scores (B,), the first that is not finite, in a phrase; None if there is none."""
    finite = np.isfinite(scores)
    if finite.all():
        return None
    first = int(np.argmin(finite))
    what = "NaN" if np.isnan(scores[first]) else "infinity, or a number beyond float32,"
    return f"returned {what} for picture {first + 1} of {len(scores)}"


def require_images(name: str, images: object) -> None:
    """Raises UserError unless `images` is uint8 (B, H, W, 3): floats in 0..1 would all be scored as black."""
    dtype = getattr(images, "dtype", type(images).__name__)
    shape: tuple[int, ...] = getattr(images, "shape", ())
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise UserError(f"reward {name!r}: images must be uint8 RGB (B, H, W, 3), not {dtype} {tuple(shape)}")
