"""Pictures, prompts and rewards that tests of several files share."""

import numpy as np

from dgpo_fast.prompts import Prompt

PROMPTS = [Prompt("zero", {}, "p.txt:1"), Prompt("one", {"tag": "t"}, "p.txt:2"), Prompt("two")]


def pictures(count: int = 6, size: int = 8) -> np.ndarray:
    """uint8 (count, size, size, 3); picture i is filled with i."""
    return np.repeat(np.arange(count, dtype=np.uint8), size * size * 3).reshape(count, size, size, 3)
