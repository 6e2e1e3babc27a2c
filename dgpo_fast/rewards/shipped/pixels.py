"""Statistics of pictures that see reward hacking early, and need no model.

Each takes pictures, uint8 (N, H, W, 3), RGB, and compares well between two sets from the same prompts and noise: what
a policy draws, and what its base model draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.records import Metadata
from dgpo_fast.rewards.protocol import require_images

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""Rec. 709 weights of red, green and blue."""
EDGE = 0.1
"""Neighbours whose luma differs by more than this are an edge; a pattern of a few percent is none."""
DARK = 0.15
"""Pixels of a lower luma are dark."""
BITS = 3
"""Bits of each channel in the colour histogram: 512 colours."""
THUMBNAIL = 8
"""Pictures are compared at this many pixels a side."""
PERIODS = (2, 4, 8, 16)
"""Periods in pixels at which decoders and patches leave a grid."""


def luma(images: np.ndarray) -> np.ndarray:
    """Brightness of each pixel in [0, 1], float32 (N, H, W)."""
    return images.astype(np.float32) @ LUMA / 255


def edge_density(images: np.ndarray) -> np.ndarray:
    """Share of pixels that differ from the next one, to the right or below, by more than `EDGE`, (N,)."""
    light = luma(images)
    right, below = np.abs(np.diff(light, axis=2))[:, :-1], np.abs(np.diff(light, axis=1))[:, :, :-1]
    return (np.maximum(right, below) > EDGE).mean(axis=(1, 2))


def colour_entropy(images: np.ndarray) -> np.ndarray:
    """Entropy of the colour histogram in bits, (N,): 0 for one colour, at most 9."""
    red, green, blue = np.moveaxis(images >> (8 - BITS), -1, 0).astype(np.int64)
    colours = ((red << 2 * BITS) + (green << BITS) + blue).reshape(len(images), -1)
    shares = np.stack([np.bincount(one, minlength=8**BITS) for one in colours]) / colours.shape[1]
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1)


def brightness(images: np.ndarray) -> np.ndarray:
    """Mean luma, (N,) in [0, 1]."""
    return luma(images).mean(axis=(1, 2))


def dark_share(images: np.ndarray) -> np.ndarray:
    """Share of pixels with a luma below `DARK`, (N,)."""
    return (luma(images) < DARK).mean(axis=(1, 2))


def saturation(images: np.ndarray) -> np.ndarray:
    """Mean of (max − min) / max over the channels of a pixel, (N,) in [0, 1]; black has none."""
    largest, smallest = images.max(-1).astype(np.float32), images.min(-1).astype(np.float32)
    return ((largest - smallest) / np.maximum(largest, 1)).mean(axis=(1, 2))


OF_EACH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "edge_density": edge_density,
    "colour_entropy": colour_entropy,
    "brightness": brightness,
    "dark_share": dark_share,
    "saturation": saturation,
}
"""Statistics of a picture, by name."""


def diversity(images: np.ndarray, group_size: int) -> np.ndarray:
    """Mean distance between two of a prompt's pictures, (P,): the root mean square difference of their thumbnails.

    Args:
        images: P groups of `group_size` ≥ 2, the pictures of a prompt together.
    """
    small = _thumbnails(images).reshape(-1, group_size, THUMBNAIL**2 * 3)
    square = np.square(small).mean(-1)
    product = small @ small.transpose(0, 2, 1) / small.shape[-1]
    distance = np.sqrt(np.maximum(square[:, :, None] + square[:, None] - 2 * product, 0))
    first, second = np.triu_indices(group_size, 1)
    return distance[:, first, second].mean(axis=1)


def grid(images: np.ndarray) -> np.ndarray:
    """How far each frequency of a periodic grid stands out of the mean spectrum of N pictures, (K,).

    These are the frequencies that any repetition with one of `PERIODS` is made of, in a fixed order for pictures of one
    size. Their power is over the median at frequencies of about the same length. Rounding to 8 bits is added to both,
    so that what cannot be seen does not count.
    """
    period = max(_periods(images))
    height, width = (side - side % period for side in images.shape[1:3])
    light = luma(images[:, :height, :width])
    window = np.hanning(height + 1)[:height, None] * np.hanning(width + 1)[:width]
    light = (light - light.mean(axis=(1, 2), keepdims=True)) * window.astype(np.float32)
    power = np.mean([np.abs(np.fft.fft2(one)) ** 2 for one in light], axis=0)
    power += np.square(window).sum() / 12 / 255**2
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    ring = np.rint(np.hypot(rows, columns) * max(height, width)).astype(int)
    repeated = np.isclose(rows * period % 1, 0) & np.isclose(columns * period % 1, 0) & (ring > 0)
    medians = {one: np.median(power[(abs(ring - one) <= 1) & ~repeated]) for one in np.unique(ring[repeated])}
    return np.array([power[at] / medians[ring[at]] for at in zip(*np.nonzero(repeated), strict=True)])


def grid_growth(images: np.ndarray, base: np.ndarray) -> float:
    """How much further than in the pictures `base` a grid stands out, at the frequency at which it has grown most."""
    return float((grid(images) / grid(base)).max())


def statistics(images: np.ndarray, group_size: int) -> dict[str, float]:
    """Means of P groups of `group_size` pictures: of all that is of a picture, and of the diversity of prompts."""
    means = {name: float(of_each(images).mean()) for name, of_each in OF_EACH.items()}
    return {**means, "diversity": float(diversity(images, group_size).mean())}


def _periods(images: np.ndarray) -> list[int]:
    """Those of `PERIODS` that repeat at least four times in a picture; the shortest one in any."""
    return [period for period in PERIODS if 4 * period <= min(images.shape[1:3])] or [PERIODS[0]]


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Means of `THUMBNAIL` × `THUMBNAIL` tiles in [0, 1], float32 (N, THUMBNAIL, THUMBNAIL, 3)."""
    rows, columns = (np.linspace(0, side, THUMBNAIL + 1).astype(int) for side in images.shape[1:3])
    sums = np.add.reduceat(np.add.reduceat(images.astype(np.float32), rows[:-1], axis=1), columns[:-1], axis=2)
    return sums / (255 * np.diff(rows)[:, None, None] * np.diff(columns)[:, None])


class PixelsReward:
    """Statistics of each picture, to be shown beside other rewards: `--rewards shapes pixels=0`.

    The score is the edge density; the other statistics are parts. None of them says whether a picture is good.
    """

    runs_on_cpu = True
    independent_images = True
    metadata_keys = ()

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores float32 (B,) for uint8 (B, H, W, 3) images; prompts and metadata are not used.

        Raises:
            UserError: images of another type or shape.
        """
        require_images("pixels", images)
        found = {name: of_each(images).astype(np.float32) for name, of_each in OF_EACH.items()}
        return found.pop("edge_density"), found

    def self_test(self) -> None:
        """Raises UserError unless a picture that is black on the left and red on the right has a known brightness."""
        picture = np.zeros((1, 16, 16, 3), np.uint8)
        picture[:, :, 8:, 0] = 255
        seen = float(self(picture, [""], [{}])[1]["brightness"][0])
        if abs(seen - LUMA[0] / 2) > 1e-3:
            raise UserError(
                f"reward 'pixels' failed its self-test: a picture of half red has brightness {seen:.3f}, not "
                f"{LUMA[0] / 2:.3f}: reinstall numpy"
            )
