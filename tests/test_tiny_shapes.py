"""The shapes reward: scores worked out by hand, pictures that match and pictures that do not."""

import re
import sys

import numpy as np
import pytest
from scipy import ndimage

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.tiny import data
from dgpo_fast.tiny.shapes import Found, ShapesReward, relations, score

METADATA = dict(data.all_prompts())
THREE_STARS = METADATA["a photo of three stars"]
RED_CIRCLE_BLUE_SQUARE = METADATA["a photo of a red circle and a blue square"]
CIRCLE_LEFT_OF_SQUARE = METADATA["a photo of a circle left of a square"]


def found(shape: str, color: str = "red", x: float = 8, y: float = 16) -> Found:
    return Found(shape, color, (x, y), (10, 10))


@pytest.mark.parametrize(
    ("objects", "metadata", "graded", "correct", "strict"),
    [
        # 1 − |found − 3| / 3; a fourth star reaches `exclude`.
        ([], THREE_STARS, 0, False, False),
        ([found("star")] * 2, THREE_STARS, 2 / 3, False, False),
        ([found("star")] * 3, THREE_STARS, 1, True, True),
        ([found("star")] * 3 + [found("ring")], THREE_STARS, 1, True, True),
        ([found("star")] * 4, THREE_STARS, 2 / 3, False, False),
        ([found("star")] * 7, THREE_STARS, 0, False, False),
        # Without `exclude`, more than asked for is officially correct, but not strictly.
        ([found("ring")] * 2, METADATA["a photo of a ring"], 0, True, False),
        # Four terms: circle counted, circle red, square counted, square blue.
        ([found("circle"), found("square", "blue")], RED_CIRCLE_BLUE_SQUARE, 1, True, True),
        ([found("circle"), found("square", "red")], RED_CIRCLE_BLUE_SQUARE, 3 / 4, False, False),
        ([found("circle")], RED_CIRCLE_BLUE_SQUARE, 2 / 4, False, False),
        ([found("circle"), found("circle"), found("square", "blue")], RED_CIRCLE_BLUE_SQUARE, 2 / 4, True, False),
        ([found("circle", "blue"), found("square", "red")], RED_CIRCLE_BLUE_SQUARE, 2 / 4, False, False),
        # Three terms: square counted, circle counted, circle left of square.
        ([found("circle", x=8), found("square", x=22)], CIRCLE_LEFT_OF_SQUARE, 1, True, True),
        ([found("circle", x=22), found("square", x=8)], CIRCLE_LEFT_OF_SQUARE, 2 / 3, False, False),
        ([found("circle", x=8)], CIRCLE_LEFT_OF_SQUARE, 1 / 3, False, False),
        # The circle's count is wrong, so its position scores 0; officially one circle to the left is enough.
        ([found("circle", x=8)] * 2 + [found("square", x=22)], CIRCLE_LEFT_OF_SQUARE, 1 / 3, True, False),
    ],
)
def test_scores_by_hand(objects, metadata, graded, correct, strict):
    assert score(objects, metadata) == (pytest.approx(graded), correct, strict)


def test_position_rule_by_hand():
    centre = found("square", x=16, y=16)
    # Offset (−10, 0), shrunk by 0.1 · (10 + 10) = 2 to (−8, 0), over its length 10: −0.8.
    assert relations(found("circle", x=6, y=16), centre) == {"left of"}
    # Offset (−4, 0): −2 / 4 is not beyond 0.5.
    assert relations(found("circle", x=12, y=16), centre) == set()
    # Offset (8, 10): (6, 8) / 12.8 = (0.47, 0.62).
    assert relations(found("circle", x=24, y=26), centre) == {"below"}
    # Offset (10, −10): (8, −8) / 14.1 = (0.57, −0.57), two relations at once.
    assert relations(found("circle", x=26, y=6), centre) == {"right of", "above"}
    assert relations(centre, centre) == set()


def balanced_pictures(n: int):
    rng = np.random.default_rng(0)
    prompts = data.balanced(data.all_prompts(), n)
    return np.stack([data.render(m, rng) for _, m in prompts]), [t for t, _ in prompts], [m for _, m in prompts]


def test_truth_scores_high_and_mismatches_low():
    images, texts, metadata = balanced_pictures(384)
    reward = ShapesReward()
    graded, parts = reward(images, texts, metadata)
    assert graded.dtype == np.float32 and graded.shape == (384,)
    assert graded.mean() >= 0.98 and parts["correct"].mean() >= 0.98 and parts["strict"].mean() >= 0.98
    graded, parts = reward(np.roll(images, 97, axis=0), texts, metadata)
    assert graded.mean() < 0.25 and parts["correct"].mean() < 0.1


def test_blur_and_noise_do_not_matter():
    images, texts, metadata = balanced_pictures(96)
    blurred = ndimage.gaussian_filter(images.astype(float), (0, 0.8, 0.8, 0))
    noisy = (blurred + np.random.default_rng(0).normal(0, 10, blurred.shape)).clip(0, 255).astype(np.uint8)
    assert ShapesReward()(noisy, texts, metadata)[0].mean() >= 0.98


def test_scores_do_not_depend_on_the_batch():
    images, texts, metadata = balanced_pictures(24)
    reward = ShapesReward()
    # Pictures that are mostly wrong, so that the scores differ.
    images = np.roll(images, 1, axis=0)
    together, _ = reward(images, texts, metadata)
    alone = [reward(images[i : i + 1], texts[i : i + 1], metadata[i : i + 1])[0][0] for i in range(24)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("fill", [0, 128, 255])
def test_empty_pictures_score_zero(fill: int):
    images = np.full((3, 32, 32, 3), fill, np.uint8)
    graded, parts = ShapesReward()(images, ["a photo of three stars"] * 3, [THREE_STARS] * 3)
    assert not graded.any() and not parts["correct"].any()


def test_noise_and_blobs_are_no_shapes():
    rng = np.random.default_rng(0)
    reward = ShapesReward()
    assert not any(reward.detect(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)))
    half = np.full((1, 32, 32, 3), 230, np.uint8)
    half[:, 10:20, 4:28] = data.COLORS["red"]
    assert reward.detect(half) == [[]]


def test_an_object_of_two_colours_has_none():
    images = np.full((1, 32, 32, 3), 230, np.uint8)
    images[:, 8:22, 8:15] = data.COLORS["red"]
    images[:, 8:22, 15:22] = data.COLORS["blue"]
    assert ShapesReward().detect(images) == [[Found("square", "", (15, 15), (14, 14))]]


def test_an_image_takes_few_calls():
    """94 of functions, in batches of any size: 256 images take 0.05 s, on a slow machine more, and then as all does."""
    reward, calls = ShapesReward(), []
    for count in (64, 256):
        batch = balanced_pictures(count)
        made = []
        sys.setprofile(lambda frame, event, argument, made=made: made.append(event) if "call" in event else None)
        try:
            reward(*batch)
        finally:
            sys.setprofile(None)
        calls.append(len(made) / count)
    assert max(calls) < 150, calls


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "ocr", "text": "CAT"}, 'no list "include" of what to draw'),
        ({"include": [{"class": "star"}]}, "\"count\" of 'star' is no number from 1 up"),
        ({"include": [{"class": "dog", "count": 1}]}, "reward 'shapes' has no class 'dog': use one of circle, square"),
        (
            {"include": [{"class": "star", "count": 1, "color": "pink"}]},
            "reward 'shapes' has no color 'pink': use one of red, orange",
        ),
        (
            {"include": [{"class": "star", "count": 1}, {"class": "ring", "count": 1, "position": ["near", 0]}]},
            "reward 'shapes' has no position 'near': use one of left of",
        ),
        (
            {"include": [{"class": "star", "count": 1, "position": ["above", 0]}]},
            "\"position\" of 'star' is no pair of a relation and the number of an earlier entry",
        ),
        ({"include": [{"class": "star", "count": 1}], "exclude": [{"class": "dog", "count": 1}]}, "has no class 'dog'"),
        ({"include": [{"class": "star", "count": 0}]}, "\"count\" of 'star' is no number from 1 up"),
    ],
)
def test_metadata_it_does_not_understand(metadata: dict, message: str):
    """Refused with file and line before a run, and with the prompt when it is scored."""
    with pytest.raises(UserError) as caught:
        ShapesReward().check_prompts([Prompt("p", metadata, "p.jsonl:3")])
    assert str(caught.value).startswith("p.jsonl:3: ") and message in str(caught.value)
    with pytest.raises(UserError, match=f"^'p': .*{re.escape(message)}"):
        ShapesReward()(np.zeros((1, 32, 32, 3), np.uint8), ["p"], [metadata])


def test_images_it_does_not_understand():
    with pytest.raises(UserError, match=r"images must be uint8 RGB \(B, H, W, 3\), not float32"):
        ShapesReward()(np.zeros((1, 32, 32, 3), np.float32), ["p"], [THREE_STARS])
    with pytest.raises(UserError, match="2 images, 1 prompts and 1 metadata"):
        ShapesReward()(np.zeros((2, 32, 32, 3), np.uint8), ["p"], [THREE_STARS])


def test_no_images():
    graded, parts = ShapesReward()(np.zeros((0, 32, 32, 3), np.uint8), [], [])
    assert graded.shape == (0,) and parts["correct"].shape == (0,)
