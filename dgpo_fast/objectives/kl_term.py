"""What holds a sample to the base: a KL term whose weight may grow with the distance, or depend on a second opinion.

With κ the KL term of a sample at a noise level, such as mean (v − v_ref)², and w its weight, the loss has

    w · gate · (κ + growth·κ²/2)        whose derivative by κ is   w · gate · (1 + growth·κ)

So the weight grows smoothly from w at the base, and is twice that at κ = 1/growth.

The gate, if some rewards are named for it, is large for images that training prefers and these rewards do not. With
rank the share of a group's other images that score less, of which equal ones count half,

    gate = max(0, rank of the advantage − mean of the ranks by these rewards)

in [0, 1]. It is 0 wherever they agree, and does not depend on a reward's scale. A reward that cannot tell the images of
a group apart, or that its prompt did not ask for, ranks all of them ½: it confirms nothing.

The gate is after GARDO (arXiv 2512.24138), which holds images whose trained reward is suspiciously high. Inferred are
ranks within a group instead of the batch, and a share instead of the top few; in the released code, which was read but
not run, the difference of the ranks seems to have the opposite sign. The growth is of no paper.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.rewards import GroupScores
from dgpo_fast.rewards.group_log import EQUAL_TO


def weighed(kl: Tensor, weight: float | Tensor, growth: float = 0.0, gate: Tensor | None = None) -> Tensor:
    """w · gate · (κ + growth·κ²/2) of each sample, (B,).

    Args:
        kl: (B,) κ.
        weight: w, a number or (B,).
        growth: ≥ 0.
        gate: (B,); None: 1.
    """
    term = weight * kl
    if growth:
        term = term * (1 + growth / 2 * kl)
    return term if gate is None else gate * term


def gates(scores: GroupScores, advantage: Tensor, rewards: Sequence[str]) -> Tensor | None:
    """The gate of each image, (P, G) fp32 on the CPU, 0 in groups that could not be scored; None without `rewards`.

    Args:
        scores: of P groups.
        advantage: (P'·G,) of those that could be scored.
        rewards: that are to agree.
    """
    if not rewards:
        return None
    unknown, gate = np.full_like(scores.rewards, np.nan), np.zeros(scores.rewards.shape, np.float32)
    trained = ranks(advantage.numpy().reshape(-1, scores.rewards.shape[1]))
    others = np.mean([ranks(scores.parts.get(name, unknown)[scores.valid]) for name in rewards], axis=0)
    gate[scores.valid] = (trained - others).clip(min=0)
    return torch.from_numpy(gate)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Of (P, G) scores, the share of each group's other images that score less; equal ones, to within rounding, count
    half, and so do all of a group without scores (NaN)."""
    scores = np.nan_to_num(scores.astype(np.float64))
    difference = scores[:, :, None] - scores[:, None]
    differ = np.abs(difference) > EQUAL_TO * np.abs(scores).max(axis=1)[:, None, None]
    return 0.5 + (np.sign(difference) * differ).sum(axis=2) / (2 * (scores.shape[1] - 1))
