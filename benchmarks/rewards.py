"""Rewards that take no time worth mentioning, for timing everything else."""

from collections.abc import Sequence

import numpy as np


class Brightness:
    """The mean of a picture's values."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> np.ndarray:
        """(B,) for uint8 (B, H, W, 3)."""
        return images.mean((1, 2, 3), dtype=np.float64)


class HalfEqual(Brightness):
    """Brightness for every other group that it is asked for; the groups between them get equal rewards."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> np.ndarray:
        """(B,) for uint8 (B, H, W, 3)."""
        self.calls += 1
        return super().__call__(images, prompts, metadata) * (self.calls % 2)
