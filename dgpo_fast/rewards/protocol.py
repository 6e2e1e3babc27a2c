"""The interface of rewards."""

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

    Two methods and six attributes are optional:

    - `check_prompts(prompts: Sequence[Prompt]) -> str | None` raises `UserError` for prompts that cannot be scored, and
      may return a line that the user should read. It is called once, before anything is drawn.
    - `self_test() -> None` raises if the reward does not work here, e.g. by scoring an image whose score is known. It
      is called once, when the reward is loaded.
    - `groups_at_once: int`, for a reward that waits for another machine: the number of threads that call it at a time,
      each with the images of another prompt.
    - `runs_on_cpu = True`: scoring needs no GPU and only depends on the arguments. The reward may be loaded again in
      worker processes, which score several groups at a time during the rollout.
    - `independent_images = True`: an image's score does not depend on the other images of its group, so several
      processes, workers or trainers, may share a group. A run with fewer groups than processes needs it.
    - `needs_real_pictures = True`: it cannot score coloured squares, with which a user's own reward is tested before a
      run.
    - `metadata_keys: tuple[str, ...]`: all keys of the metadata that it reads. Keys that no reward of a run reads are
      named at its start; without this attribute, a reward counts as reading all of them.
    - `fingerprint: str` tells apart rewards that may have one name: stored scores are only reused if it is the same.
      By default, it is a hash of the user's module.
    """

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> np.ndarray | tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores B images; they are the images of one prompt when a trainer asks.

        Args:
            images: uint8 (B, H, W, 3), RGB in 0..255. A copy: the reward may change it.
            prompts: B texts.
            metadata: B dictionaries with what the prompt's source has besides the text, e.g. GenEval's `include`.

        Returns:
            Scores, floats (B,), higher is better; or `(scores, parts)`, where each of `parts` is (B,) and only logged.
            Lists and tensors are accepted. After a score that is not finite, or an exception, the prompt's group is
            dropped in this iteration.
        """
        ...


def not_finite(scores: np.ndarray) -> str | None:
    """A phrase that names the first of the scores (B,) that is not finite; None if all are."""
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
