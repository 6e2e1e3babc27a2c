"""Means of scored images and how certain they are."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from dgpo_fast.prompts import Prompt
from dgpo_fast.records import JsonObject


def mean_with_ci95(rewards: np.ndarray, clusters: list[str]) -> tuple[float, list[float]]:
    """Mean of the finite rewards and its 95 % interval.

    Images of one prompt resemble one another, so the interval counts prompts, not images, as independent: the
    cluster-robust standard error of a mean, times Student's t for the number of prompts. It is NaN for a lone prompt.

    Args:
        rewards: (N,) float, NaN if missing.
        clusters: the prompt of each image.
    """
    kept = np.isfinite(rewards)
    if not kept.any():
        return float("nan"), [float("nan"), float("nan")]
    mean = float(rewards[kept].mean())
    sums: dict[str, float] = defaultdict(float)
    for residual, cluster in zip((rewards - mean)[kept], np.array(clusters)[kept], strict=True):
        sums[cluster] += float(residual)
    count = len(sums)
    if count == 1:
        return mean, [float("nan"), float("nan")]  # one prompt says nothing of others
    half = (
        stdtrit(count - 1, 0.975)
        * float(np.sqrt(count / (count - 1) * sum(s * s for s in sums.values())))
        / int(kept.sum())
    )
    return mean, [mean - half, mean + half]


class Mean(NamedTuple):
    """A mean with what it is of.

    Attributes:
        mean: of the images that have a score.
        ci95: its 95 % interval, both ends; see `mean_with_ci95`.
        prompts: how many prompts these images have.
        images: how many there are.
    """

    mean: float
    ci95: list[float]
    prompts: int
    images: int

    @classmethod
    def of(cls, scores: np.ndarray, prompts: Sequence[Prompt]) -> "Mean":
        """Of N scores, NaN if missing, and the prompt of each."""
        texts, known = [prompt.text for prompt in prompts], np.isfinite(scores)
        count = len({text for text, is_known in zip(texts, known, strict=True) if is_known})
        return cls(*mean_with_ci95(scores, texts), count, int(known.sum()))


def geneval_scores(correct: np.ndarray, prompts: Sequence[Prompt]) -> JsonObject:
    """GenEval's official figures: its overall score is the mean over the tags of the share of correct images.

    Args:
        correct: (N,) 0 or 1, NaN if the image could not be judged.
        prompts: N prompts, each with its tag.

    Returns:
        `overall_score` and its 95 % interval, `correct_images_share`, `correct_prompts_share` (prompts of which at
        least one image is correct) and `tags`, each tag's share.
    """
    tags = np.array([prompt.tag for prompt in prompts])
    texts = [prompt.text for prompt in prompts]
    shares: JsonObject = {}
    variance = 0.0
    for tag in dict.fromkeys(tags.tolist()):
        rows = np.flatnonzero(tags == tag)
        share, (low, high) = mean_with_ci95(correct[rows], [texts[row] for row in rows])
        shares[tag] = {"correct_images_share": share, "images_count": int(np.isfinite(correct[rows]).sum())}
        variance += ((high - low) / 2) ** 2
    overall = float(np.mean([one["correct_images_share"] for one in shares.values()]))
    half = float(np.sqrt(variance)) / len(shares)
    best: dict[str, float] = {}
    for text, value in zip(texts, correct, strict=True):
        if np.isfinite(value):
            best[text] = max(best.get(text, 0.0), float(value))
    return {
        "overall_score": overall,
        "overall_score_ci95": [overall - half, overall + half],
        "correct_images_share": mean_with_ci95(correct, texts)[0],
        "correct_prompts_share": float(np.mean(list(best.values()))) if best else float("nan"),
        "tags": shares,
    }
