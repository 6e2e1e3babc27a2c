"""Means of scored images and how certain they are."""

from collections import defaultdict

import numpy as np

Z_95 = 1.959964


def mean_with_ci95(rewards: np.ndarray, clusters: list[str]) -> tuple[float, list[float]]:
    """Mean of the finite rewards and its 95 % interval.

    Images of one prompt resemble one another, so the interval counts prompts, not images, as independent (the
    cluster-robust standard error of a mean).

    Args:
        rewards: (N,) float, NaN where missing.
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
    correction = count / (count - 1) if count > 1 else 1.0
    half = Z_95 * float(np.sqrt(correction * sum(s * s for s in sums.values()))) / int(kept.sum())
    return mean, [mean - half, mean + half]
