"""The `shapes` reward: GenEval's graded score on pictures of the miniature world.

Pictures are segmented by colour and cut into connected components; each component gets its shape from the nearest
template and its colour by a vote of its pixels. What was found is compared with GenEval metadata.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.geneval import require_geneval_metadata, require_known
from dgpo_fast.rewards.protocol import require_images
from dgpo_fast.rewards.shipped.geneval_rules import Matched, Scores, graded, relations, share_in_relation
from dgpo_fast.tiny import data

__all__ = ["Found", "Scores", "ShapesReward", "relations", "score"]

_CHROMA = 175.0
"""Chroma (max − min channel) of a pixel that a shape covers whole; a pixel's chroma over this is its coverage."""
_COVERED = 0.45
_MIN_AREA = 14 / data.SIZE**2
"""Components of a smaller share of the picture are specks, not objects."""
_MAX_ASPECT = 1.45
_GRID = 12
"""Components are compared on a grid of this many points a side."""
_MAX_DISTANCE = 0.075
"""Largest mean squared difference to a template at which a component still counts as a shape."""
_COLOR_VOTE = 0.6
_HUE_RADIUS = 0.4


class Found(NamedTuple):
    """One object: its shape, its colour ("" if no single one) and its box in pixels."""

    shape: str
    color: str
    centre: tuple[float, float]
    size: tuple[float, float]


class ShapesReward:
    """GenEval's graded score, in [0, 1], for pictures of coloured shapes.

    `reward(images, prompts, metadata)` takes uint8 images (B, H, W, 3), B prompts and B GenEval metadata dicts and
    returns the graded scores, float32 (B,), with the parts "correct" (official: at least the count, `exclude`
    respected) and "strict" (exactly the count), each float32 (B,) of zeros and ones.

    Raises:
        UserError: images of another type or shape, or metadata that lacks `include` or asks for what this world lacks.
    """

    runs_on_cpu = True
    independent_images = True
    metadata_keys = ("exclude",)

    def __init__(self) -> None:
        self._templates, self._template_shapes = _templates()

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[data.Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        require_images("shapes", images)
        if not len(images) == len(prompts) == len(metadata):
            raise UserError(
                f"reward 'shapes': {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata: "
                "pass as many of each"
            )
        self.check_prompts([Prompt(text, one) for text, one in zip(prompts, metadata, strict=True)])
        found = self.detect(images)
        scores = [score(objects, one) for objects, one in zip(found, metadata, strict=True)]
        columns = np.array(scores, np.float32).reshape(-1, len(Scores._fields)).T
        graded, correct, strict = columns
        return graded, {"correct": correct, "strict": strict}

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError, with file and line, for a prompt that asks for what this world lacks."""
        require_geneval_metadata(prompts)
        require_known("shapes", prompts, {"class": data.SHAPES, "color": data.COLORS, "position": data.RELATIONS})

    def self_test(self) -> None:
        """Raises UserError unless a red circle left of a blue square is seen as just that."""
        square = {"class": "square", "count": 1}
        circle = {"class": "circle", "count": 1, "position": ["left of", 0]}
        golden = {"include": [{**square, "color": "blue"}, {**circle, "color": "red"}]}
        mirrored = {"include": [{**square, "color": "red"}, {**circle, "color": "blue"}]}
        picture = data.render(golden, np.random.default_rng(0))
        (right, swapped), _ = self(np.stack([picture] * 2), ["golden", "mirrored"], [golden, mirrored])
        if not (right == 1 and abs(swapped - 2 / 5) < 1e-6):  # two counts of five terms
            seen = f"a red circle left of a blue square scores {right:.3f}, and {swapped:.3f} with its colours swapped"
            raise UserError(f"reward 'shapes' failed its self-test: {seen}, not 1 and 0.4")

    def detect(self, images: np.ndarray) -> list[list[Found]]:
        """The objects in each of the images, uint8 (B, H, W, 3), largest first."""
        found: list[list[Found]] = [[] for _ in images]
        pixels = images.astype(np.float32)
        chroma = pixels.max(-1) - pixels.min(-1)
        within_a_picture = np.zeros((3, 3, 3), bool)
        within_a_picture[1] = True
        labels, n = ndimage.label(chroma > _COVERED * _CHROMA, within_a_picture)
        if n == 0:
            return found
        area = np.bincount(labels.ravel(), minlength=n + 1)[1:]
        boxes = np.array([[(s.start, s.stop) for s in box] for box in ndimage.find_objects(labels)])
        start, extent = boxes[:, 1:, 0], boxes[:, 1:, 1] - boxes[:, 1:, 0]
        shape, distance = self._classify(chroma / _CHROMA, labels, boxes)
        colors = _colors(pixels, chroma, labels, n)
        is_object = (
            (area >= _MIN_AREA * chroma[0].size)
            & (extent.max(1) <= _MAX_ASPECT * extent.min(1))
            & (distance <= _MAX_DISTANCE)
        )
        centre = start + extent / 2
        for i in np.argsort(-area, kind="stable"):
            if is_object[i]:
                (y, x), (height, width) = centre[i].tolist(), extent[i].tolist()
                found[boxes[i, 0, 0]].append(Found(shape[i], colors[i], (x, y), (width, height)))
        return found

    def _classify(self, coverage: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Shape of the nearest template and the squared distance to it, of each component."""
        grids = _grids(coverage, labels, boxes)
        products = grids @ self._templates.T
        distances = (grids**2).sum(1)[:, None] - 2 * products + (self._templates**2).sum(1)[None]
        nearest = distances.argmin(1)
        return [self._template_shapes[i] for i in nearest], distances.min(1) / _GRID**2


def score(found: Sequence[Found], metadata: data.Metadata) -> Scores:
    """GenEval's graded, official and strict results of what was found in one picture.

    Official ("correct"): at least `count` objects of every entry in its colour, its position right, and no `exclude`
    entry reached. Strict: official, and exactly `count` of every class.
    """
    matched = []
    for wanted in metadata["include"]:
        objects = [o for o in found if o.shape == wanted["class"]]
        matched.append(Matched(wanted, objects, [o for o in objects if o.color == wanted.get("color", o.color)]))
    first = [one.in_color[: one.wanted["count"]] for one in matched]
    correct = True
    for index, one in enumerate(matched):
        correct = correct and len(first[index]) == one.wanted["count"]
        if "position" in one.wanted:
            correct = correct and share_in_relation(first, index, one.wanted["position"]) == 1
    for unwanted in metadata.get("exclude", ()):
        correct = correct and sum(o.shape == unwanted["class"] for o in found) < unwanted["count"]
    return Scores(graded(matched), correct, correct and all(one.exact for one in matched))


def _grids(coverage: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Each component stretched to a square and sampled, float32 (components, _GRID²)."""
    own = np.zeros((len(boxes), _GRID, _GRID), np.float32)
    image, number = boxes[:, 0, 0, None, None], np.arange(1, len(boxes) + 1)[:, None, None]
    points = (np.arange(_GRID) + 0.5) / _GRID
    y, x = (boxes[:, axis, :1] + points * (boxes[:, axis, 1:] - boxes[:, axis, :1]) - 0.5 for axis in (1, 2))
    rows, columns = np.floor(y).astype(int), np.floor(x).astype(int)
    height, width = labels.shape[1:]
    for down, right in np.ndindex(2, 2):
        weight = (1 - np.abs(y - rows - down))[:, :, None] * (1 - np.abs(x - columns - right))[:, None, :]
        row = np.clip(rows + down, 0, height - 1)[:, :, None]
        column = np.clip(columns + right, 0, width - 1)[:, None, :]
        mine = labels[image, row, column] == number
        own += weight * mine * np.minimum(coverage[image, row, column], 1)
    return own.reshape(len(boxes), -1)


def _templates() -> tuple[np.ndarray, list[str]]:
    """Every shape in every size the world draws, sharp and blurred as decoders draw it, sampled as pictures are."""
    grids, shapes = [], []
    for shape in data.SHAPES:
        for size in range(10, 19):
            sharp = np.pad(data.coverage(shape, size), 3)
            for blur in (0.0, 0.6):
                coverage = ndimage.gaussian_filter(sharp, blur)[None] if blur else sharp[None]
                labels, _ = ndimage.label(coverage > _COVERED, np.ones((3, 3, 3), bool))
                box = [[(s.start, s.stop) for s in ndimage.find_objects(labels)[0]]]
                grids.append(_grids(coverage, labels, np.array(box))[0])
                shapes.append(shape)
    return np.array(grids, np.float32), shapes


def _colors(pixels: np.ndarray, chroma: np.ndarray, labels: np.ndarray, n: int) -> list[str]:
    """The colour that most pixels of each component vote for, "" if they do not agree on one."""
    hues = np.array([(np.array(c) - min(c)) / (max(c) - min(c)) for c in data.COLORS.values()], np.float32)
    inside = labels > 0
    hue = (pixels[inside] - pixels[inside].min(-1, keepdims=True)) / chroma[inside][:, None]
    distance = np.linalg.norm(hue[:, None] - hues[None], axis=-1)
    vote = np.where(distance.min(1) <= _HUE_RADIUS, distance.argmin(1), len(hues))
    votes = np.bincount(labels[inside] * (len(hues) + 1) + vote, minlength=(n + 1) * (len(hues) + 1))
    share = votes.reshape(n + 1, -1)[1:] / votes.reshape(n + 1, -1)[1:].sum(1, keepdims=True)
    names = [*data.COLORS, ""]
    return [names[s.argmax()] if s.max() >= _COLOR_VOTE else "" for s in share]
