"""The `geneval-hf` reward: GenEval with transformers' Mask2Former as the detector and CLIP as the judge of colours.

GenEval's own detector is mmdet's Mask2Former with Swin-S. This one has the same architecture but different weights, so
results of single pictures can differ, most of all in counting, where only detections above 0.9 count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.geneval import CLASSES, COLORS, require_geneval_metadata, require_known, require_tags
from dgpo_fast.prompts.prompt import Prompt
from dgpo_fast.records import Metadata
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.protocol import require_images
from dgpo_fast.rewards.shipped import models
from dgpo_fast.rewards.shipped.clip import OPENAI, Clip
from dgpo_fast.rewards.shipped.geneval_rules import RELATIONS, THRESHOLD, Detection, Rule, Scores, keep, score

DETECTOR = models.Published(
    "facebook/mask2former-swin-small-coco-instance",
    {"backbone_config.embed_dim": 96, "backbone_config.depths": [2, 2, 18, 2]},
)
# ImageNet's mean and standard deviation of RGB in [0, 1], which the detector was trained on.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The golden red, (220, 20, 20), by these: (220 / 255 − 0.485) / 0.229 and so on, worked out by hand.
_RED = (1.6495, -1.6856, -1.4559)
_CHUNK = 8  # images per forward of the detector
_STRIDE = 32  # the detector's coarsest grid, in pixels
_BACKGROUND = 0x99  # what a colour crop shows around the object
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class GenevalReward:
    """GenEval's graded score, in [0, 1] with the rule "fixed", for prompts with GenEval metadata.

    Parts: `correct` is the authors' own verdict and `strict` the same with exact counts, each 0 or 1. GenEval's
    published figure is the mean over its six tags of each tag's mean of `correct`.
    """

    independent_images = True
    metadata_keys = ("exclude",)

    def __init__(
        self, detector: str | Path = DETECTOR.source, clip: str | Path = OPENAI.source, *, rule: Rule = "fixed"
    ) -> None:
        """
        Args:
            detector: hub name or folder of a Mask2Former for COCO's 80 classes.
            clip: hub name or folder of the CLIP that names colours.
            rule: how the graded score treats failures: "fixed", or "compat" as in Flow-GRPO's and DGPO's releases
                (see `geneval_rules`). `correct` and `strict` do not depend on it.

        Raises:
            UserError: a model is not available, is not of this kind or is another one under the published name; or an
                unknown rule.
        """
        if rule not in ("fixed", "compat"):
            raise UserError(f"reward 'geneval-hf': no rule {rule!r}: use 'fixed' or 'compat'")
        self._rule: Rule = rule
        self._detector = Detector(detector)
        self._colors = ColorJudge(clip)

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Graded scores float32 (B,) of uint8 images (B, H, W, 3), and `correct` and `strict`, float32 (B,), 0 or 1.

        Raises:
            UserError: images of another type or shape, or metadata that cannot be scored.
        """
        require_images("geneval-hf", images)
        self.check_prompts([Prompt(text, one) for text, one in zip(prompts, metadata, strict=True)])
        found = [
            keep(detections, one.get("tag", ""))
            for detections, one in zip(self._detector.detect(images), metadata, strict=True)
        ]
        colored = self._with_colors(images, found, metadata)
        scores = [score(objects, one, self._rule) for objects, one in zip(colored, metadata, strict=True)]
        graded, correct, strict = np.array(scores, np.float32).reshape(-1, len(Scores._fields)).T
        return graded, {"correct": correct, "strict": strict}

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError, with file and line, for metadata that is malformed or asks for what GenEval has not, and
        for a tag that is misspelt."""
        require_geneval_metadata(prompts)
        require_tags("geneval-hf", prompts)
        require_known("geneval-hf", prompts, {"class": CLASSES, "color": COLORS, "position": tuple(RELATIONS)})

    def self_test(self) -> None:
        """Raises UserError unless the detector gets colours as it was trained on them, finds the one person on a
        portrait, and nothing on grey, and CLIP names the colours of squares."""
        self._detector.self_test()
        photo = golden.photo()
        pictures = np.concatenate([photo, golden.grey()])
        seen = [keep(one, "counting") for one in self._detector.detect(pictures)]
        height, width = photo.shape[1:3]
        people = [one for one in seen[0] if one.name == "person"]
        area = math.prod(people[0].size) / (height * width) if people else 0.0
        if len(people) != 1 or not area > 0.4 or seen[1]:
            names = [", ".join(one.name for one in objects) or "nothing" for objects in seen]
            message = f"found {names[0]} on a portrait and {names[1]} on plain grey: wrong detector?"
            raise UserError(f"reward 'geneval-hf' failed its self-test: {message}")
        self._colors.self_test()

    def _with_colors(
        self, images: np.ndarray, found: Sequence[Sequence[Detection]], metadata: Sequence[Metadata]
    ) -> list[list[Detection]]:
        """`found` with colours if they can matter: classes with a colour asked for, and their count reached."""
        colored = [list(objects) for objects in found]
        asked = []
        for picture, (objects, one) in enumerate(zip(found, metadata, strict=True)):
            names = [detection.name for detection in objects]
            wanted = {
                entry["class"]
                for entry in one["include"]
                if "color" in entry and names.count(entry["class"]) >= entry["count"]
            }
            asked += [(picture, place) for place, name in enumerate(names) if name in wanted]
        colors = self._colors.name([(images[picture], found[picture][place]) for picture, place in asked])
        for (picture, place), color in zip(asked, colors, strict=True):
            colored[picture][place] = replace(colored[picture][place], color=color)
        return colored


def compat() -> GenevalReward:
    """`geneval-hf` with the graded score of Flow-GRPO's and DGPO's releases; the reward `geneval-hf-compat`."""
    return GenevalReward(rule="compat")


class Detector:
    """Mask2Former, used as GenEval does: shortest side 800 pixels, masks and boxes at the picture's size."""

    def __init__(self, model: str | Path, *, shortest_side: int = 800, longest_side: int = 1333) -> None:
        """
        Args:
            model: hub name or folder.
            shortest_side: what pictures are resized to, in pixels.
            longest_side: the bound on their other side.

        Raises:
            UserError: the model is not available, is another one under the published name, or is not for COCO's 80
                classes in their usual order.
        """
        from transformers import Mask2FormerForUniversalSegmentation

        loader = Mask2FormerForUniversalSegmentation.from_pretrained
        self._model = models.load_pretrained("geneval-hf", loader, model)
        DETECTOR.require("geneval-hf", model, self._model.config)
        self._shortest, self._longest = shortest_side, longest_side
        labels = self._model.config.id2label
        # Some of COCO's classes go by several names; those that have GenEval's must have its number.
        misplaced = [label for number, label in labels.items() if label in CLASSES and CLASSES[int(number)] != label]
        if len(labels) != len(CLASSES) or misplaced:
            raise UserError(f"reward 'geneval-hf': {model} has not COCO's 80 classes in their order: wrong detector?")

    def self_test(self) -> None:
        """Raises UserError unless a red square reaches the network as ImageNet's mean and deviation make it."""
        pixels, (height, width) = self.prepare(golden.squares()[:1])
        red = pixels[0, :, height // 2, width // 2].tolist()
        if not np.allclose(red, _RED, atol=0.001):
            got, wanted = (", ".join(f"{value:.2f}" for value in one) for one in (red, _RED))
            message = f"a red square reaches the detector as {got}, not {wanted}: swapped channels or a wrong range?"
            raise UserError(f"reward 'geneval-hf' failed its self-test: {message}")

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """The objects in each of uint8 images (B, H, W, 3), with confidence beyond 0.3 and masks (H, W)."""
        found: list[list[Detection]] = []
        for start in range(0, len(images), _CHUNK):
            found += self._detect(images[start : start + _CHUNK])
        return found

    @torch.inference_mode()
    def _detect(self, images: np.ndarray) -> list[list[Detection]]:
        pixels, resized = self.prepare(images)
        outputs = self._model(pixel_values=pixels)
        classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
        sizes = (pixels.shape[-2], pixels.shape[-1]), resized, (images.shape[1], images.shape[2])
        return [read_out(*one, sizes) for one in zip(classes, outputs.masks_queries_logits, strict=True)]

    def prepare(self, images: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images normalised and padded at the right and below to multiples of 32, and their (height, width) before."""
        height, width = images.shape[1:3]
        scale = min(self._shortest / min(height, width), self._longest / max(height, width))
        resized = int(height * scale + 0.5), int(width * scale + 0.5)
        pixels = models.resize(models.to_tensor(images, self._model.device), resized, "bilinear")
        pixels = models.normalise(pixels, _MEAN, _STD)
        return F.pad(pixels, (0, -resized[1] % _STRIDE, 0, -resized[0] % _STRIDE)), resized


def read_out(
    classes: torch.Tensor, mask_logits: torch.Tensor, sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
) -> list[Detection]:
    """Mask2Former's answer for one picture as detections with confidence beyond 0.3.

    A detection is one of the Q most probable pairs of query and class; its confidence is that probability times the
    mean of its mask's probabilities over the mask, and its box encloses the mask.

    Args:
        classes: probabilities (Q, 80), "no object" left out.
        mask_logits: (Q, h, w).
        sizes: (height, width) of the network's input, of the resized picture in its upper left corner, and of the
            picture itself.
    """
    padded, resized, (height, width) = sizes
    probabilities, pairs = classes.flatten().topk(len(classes))
    # A mask's mean probability is at most 1, so pairs below the threshold need no mask.
    likely = probabilities > THRESHOLD
    probabilities, pairs = probabilities[likely], pairs[likely]
    if not len(pairs):
        return []
    logits = mask_logits[pairs // classes.shape[1]][None].float()
    logits = F.interpolate(logits, padded, mode="bilinear", align_corners=False)[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    mean = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    found = []
    numbers = (pairs % classes.shape[1]).tolist()
    for number, confidence, mask in zip(numbers, (probabilities * mean).tolist(), masks.cpu().numpy(), strict=True):
        if confidence > THRESHOLD:
            found.append(Detection(CLASSES[number], confidence, box_of(mask), mask))
    return found


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a bool mask (H, W) with at least one pixel; right and bottom one past the last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorJudge:
    """Names the colour of an object: CLIP compares its crop, on grey, with three descriptions per colour."""

    def __init__(self, clip: str | Path) -> None:
        """Loads the model, by hub name or folder. Raises UserError if it is not available."""
        self._clip = Clip.load("geneval-hf", OPENAI, clip)
        self._classifiers: dict[str, torch.Tensor] = {}

    def name(self, objects: Sequence[tuple[np.ndarray, Detection]]) -> list[str]:
        """The colour of each object, given with its picture, uint8 (H, W, 3)."""
        if not objects:
            return []
        device = self._clip.model.device
        crops = [models.to_tensor(crop(image, detection)[None], device) for image, detection in objects]
        features = self._clip.image_features(torch.cat([self._clip.prepare(pixels) for pixels in crops]))
        classifiers = torch.stack([self._classifier(detection.name) for _, detection in objects])
        best = torch.einsum("bd,bcd->bc", features, classifiers).argmax(1).tolist()
        return [COLORS[index] for index in best]

    def self_test(self) -> None:
        """Raises UserError unless the golden squares get their colours."""
        pictures = golden.squares()
        whole = (0.0, 0.0, float(pictures.shape[2]), float(pictures.shape[1]))
        mask = (pictures != pictures[:, :1, :1]).any(-1)
        squares = [Detection("square", 1.0, whole, one) for one in mask]
        named = self.name(list(zip(pictures, squares, strict=True)))
        if named != list(golden.COLORS):
            message = f"{', '.join(golden.COLORS)} squares are called {', '.join(named)}: wrong CLIP?"
            raise UserError(f"reward 'geneval-hf' failed its self-test: {message}")

    def _classifier(self, name: str) -> torch.Tensor:
        """One unit vector per colour (10, D): the mean of the descriptions' features. Kept, as classes recur."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            features = self._clip.text_features(texts).view(len(COLORS), len(_TEMPLATES), -1)
            self._classifiers[name] = F.normalize(features.mean(1), dim=-1)
        return self._classifiers[name]


def crop(image: np.ndarray, detection: Detection) -> np.ndarray:
    """The detection's box of an image, uint8 (H, W, 3), with #999 wherever its mask is not."""
    left, top, right, bottom = (int(edge) for edge in detection.box)
    if detection.mask is None:
        raise ValueError("a detection without a mask has no colour crop")
    shown = np.where(detection.mask[..., None], image, np.uint8(_BACKGROUND))
    return shown[top:bottom, left:right]
