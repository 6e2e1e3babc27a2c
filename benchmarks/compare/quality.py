"""What training never saw: measures of pictures that no system of the comparison is rewarded for.

* **patch distance**: how far the pictures' 4 × 4 patches are from the nearest patch of rendered pictures, in grey
  levels (0–255, root mean square over a patch). It sees blur, noise, wrong colours and frayed edges, and does not mind
  which objects are there or where, which is what the reward judges.
* **sharpness**: how steep the pictures' edges are: the mean of the steepest tenth of the differences of neighbouring
  pixels, in grey levels. Blur lowers it.
* **diversity**: how much the pictures of one prompt differ from one another, likewise in grey levels.
* **signs**: words that a real OCR engine reads on pictures of signs, a task that the systems are not trained on.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from dgpo_fast.tiny import data

PATCH, STRIDE = 4, 5
STEEPEST = 0.1
BANK_PICTURES, BANK_PATCHES = 3000, 24_000
COMPARED_AT_A_TIME = 1024


class PatchBank:
    """Patches of rendered pictures of every prompt there is, to compare others with; always the same ones."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        pictures = rendered(data.all_prompts(), BANK_PICTURES, rng)
        windows = sliding_window_view(pictures, (PATCH, PATCH), axis=(1, 2))
        places = (rng.integers(size, size=8 * BANK_PATCHES) for size in windows.shape[:3])
        patches = windows[tuple(places)].reshape(8 * BANK_PATCHES, -1)
        patches = rng.permutation(_distinct(patches))[:BANK_PATCHES]
        self.patches = torch.from_numpy(patches).float()
        self.squares = self.patches.square().sum(1)

    def distance(self, pictures: np.ndarray) -> float:
        """Mean distance of patches of `pictures`, uint8 (B, 32, 32, 3), to the nearest one in the bank."""
        windows = sliding_window_view(pictures, (PATCH, PATCH), axis=(1, 2))[:, ::STRIDE, ::STRIDE]
        patches = torch.from_numpy(windows.reshape(-1, self.patches.shape[1])).float()
        squares = torch.cat([self._nearest(chunk) for chunk in patches.split(COMPARED_AT_A_TIME)])
        return float((squares / patches.shape[1]).sqrt().mean())

    def _nearest(self, patches: Tensor) -> Tensor:
        """Smallest squared distance of each patch (B, N), (B,)."""
        return (self.squares - 2 * patches @ self.patches.T).amin(1).add(patches.square().sum(1)).clamp(min=0)


def _distinct(rows: np.ndarray) -> np.ndarray:
    """The distinct rows of a uint8 matrix; many times faster than `np.unique` along an axis."""
    as_one = np.ascontiguousarray(rows).view(f"V{rows.shape[1]}").ravel()
    return np.unique(as_one).view(np.uint8).reshape(-1, rows.shape[1])


def rendered(prompts: Sequence[data.Prompt], count: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures that satisfy prompts drawn from `prompts`, every tag as often, uint8 (count, 32, 32, 3)."""
    chosen = rng.choice(len(prompts), size=count, p=data.weights(prompts))
    return np.stack([data.render(prompts[index][1], rng) for index in chosen])


def sharpness(pictures: np.ndarray) -> float:
    """Mean over pictures of the mean of the steepest tenth of the differences of neighbouring pixels, in grey levels.

    Args:
        pictures: uint8 (B, H, W, 3).
    """
    levels = pictures.astype(np.float64)
    across, down = (np.abs(np.diff(levels, axis=axis)).mean(-1).reshape(len(levels), -1) for axis in (2, 1))
    steps = np.sort(np.concatenate([across, down], axis=1), axis=1)
    return float(steps[:, -max(1, round(STEEPEST * steps.shape[1])) :].mean())


def diversity(pictures: np.ndarray, group_size: int) -> float:
    """Root mean square difference of two pictures of one prompt, in grey levels.

    Args:
        pictures: uint8 (P·G, H, W, 3), the G pictures of a prompt together.
        group_size: G.
    """
    groups = pictures.reshape(-1, group_size, pictures[0].size).astype(np.float64)
    # The mean squared difference of all pairs is twice the variance (with G − 1).
    return float(np.sqrt(2 * groups.var(axis=1, ddof=1).mean()))
