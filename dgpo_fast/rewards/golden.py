"""Golden pictures: what they show is known, so rewards test themselves on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COLORS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 220), "yellow": (250, 220, 20)}
TEXTS = tuple(f"a {color} square" for color in COLORS)


def squares(height: int = 256, width: int = 256) -> np.ndarray:
    """A square of each of the golden colours in the middle of light grey, uint8 (4, height, width, 3)."""
    side = min(height, width)
    first, last = (round(side * edge / 256) for edge in (56, 199))
    top, left = (height - side) // 2, (width - side) // 2
    pictures = np.full((len(COLORS), height, width, 3), 225, np.uint8)
    for picture, color in zip(pictures, COLORS.values(), strict=True):
        picture[top + first : top + last + 1, left + first : left + last + 1] = color
    return pictures


def photo() -> np.ndarray:
    """The portrait of Grace Hopper that Matplotlib ships, one person before a flag, uint8 (1, H, W, 3)."""
    from matplotlib import get_data_path
    from PIL import Image

    path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.array(Image.open(path).convert("RGB"))[None]


def grey() -> np.ndarray:
    """Plain grey of the portrait's size, which shows nothing, uint8 (1, H, W, 3)."""
    return np.full_like(photo(), 128)


def noise() -> np.ndarray:
    """Random pixels of the portrait's size, always the same, uint8 (1, H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, photo().shape, dtype=np.uint8)
