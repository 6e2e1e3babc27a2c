"""What a comparison measures beside the reward."""

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.compare.quality import PatchBank, diversity, rendered, sharpness
from dgpo_fast.tiny import data


@pytest.fixture(scope="module")
def bank() -> PatchBank:
    return PatchBank()


def test_patch_distance_sees_damage_and_not_content(bank: PatchBank) -> None:
    """Held-out pictures are near, whatever they show; blur, noise and a change of hue take them away."""
    rng = np.random.default_rng(5)
    pictures = rendered(data.shape_prompts("heldout"), 120, rng)
    near = bank.distance(pictures)
    assert near < 1.0
    by_tag = [
        bank.distance(rendered([p for p in data.shape_prompts("heldout") if p[1]["tag"] == tag], 60, rng))
        for tag in data.TAGS
    ]
    assert max(by_tag) < 1.6
    noisy = np.clip(pictures + rng.normal(0, 4, pictures.shape), 0, 255).astype(np.uint8)
    blurred = ndimage.gaussian_filter(pictures, (0, 0.6, 0.6, 0))
    for damaged in (noisy, blurred, pictures[..., [1, 2, 0]]):
        assert bank.distance(damaged) > 2.5 * near


def test_sharpness_by_hand() -> None:
    """A black and a white half: of the 40 differences of 5 × 5 pixels, 5 are 255, and the steepest tenth is 4 of them.
    Blur lowers it, and it is a mean over pictures."""
    picture = np.zeros((2, 5, 5, 3), np.uint8)
    picture[0, :, 2:] = 255
    assert sharpness(picture[:1]) == 255 and sharpness(picture) == 127.5
    pictures = rendered(data.shape_prompts("heldout"), 20, np.random.default_rng(5))
    assert sharpness(ndimage.gaussian_filter(pictures, (0, 0.6, 0.6, 0))) < 0.8 * sharpness(pictures)


def test_diversity_by_hand() -> None:
    """Two pictures of a prompt 10 levels apart: 10. Equal ones: 0. Groups are averaged in the square."""
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    pictures[1] = 10
    assert diversity(pictures[:2], 2) == pytest.approx(10)
    assert diversity(pictures[2:], 2) == 0
    assert diversity(pictures, 2) == pytest.approx(np.sqrt(50))
