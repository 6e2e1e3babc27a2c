"""What a reward is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Reward(Protocol):
    """Scores images against their prompts; a class, a function or any other callable of this shape is one.

    Two methods are optional:

    - `check_prompts(prompts: Sequence[Prompt]) -> None` refuses, with a `UserError`, prompts that cannot be scored.
      It is called once, before anything is drawn.
    - `self_test() -> None` raises if the reward does not work here, e.g. by scoring an image whose score is known. It
      is called once, when the reward is loaded.
    """

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
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
