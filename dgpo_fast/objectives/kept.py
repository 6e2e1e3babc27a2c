"""Training on part of each group (`advantage.keep`): k of its G images, half of them better ones and half worse.

All images are drawn and scored, and A is the advantage among all of a group. The forwards and backwards of the images
that are left out are saved: the policy's, the reference's and θ_old's. With A' the advantages of those kept, A' of a
group sums to 0 wherever A does, which cancels what is unknown of a prompt in DGPO's score.

"extremes" keeps the k/2 images of highest and the k/2 of lowest A, with A' = A − their mean. This is another loss: the
images between have no part in it, and centring again moves the others' advantages.

"draw" draws k/2 of the images with A > 0 and k/2 of those with A < 0, with a chance proportional to |A|, and gives each
the same A' = ±2/G·(sum of |A| on its side). An image is drawn again if its chance is above 1. For any f of an image,

    the mean over those kept of A'·f  has the expectation  the mean over the group of A·f,

exactly. So DGPO's group score is right on average, and so is the gradient of a loss that is linear in A, such as those
of Flow-GRPO and AWM while no ratio is clipped. What is not such a mean is that of the images kept, which have larger
|A| than others: KL terms and pulls to θ_old, the sigmoid of DGPO's score, clips, and all of CRD's centring.
"""

import numpy as np
import torch

from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.seeds import stream_seed


def kept(batch: Batch, config: Advantage, seed: int) -> Batch:
    """The images of `batch` that are trained on; `batch` itself if they are all.

    Args:
        batch: whole groups.
        config: which are kept.
        seed: the run's.
    """
    size = config.keep
    if size is None or size == batch.group_size:
        return batch
    everyone = batch.advantage if batch.part is None else batch.part.advantage
    groups = everyone.double().cpu().numpy().reshape(batch.groups, batch.group_size)
    if config.keep_by == "extremes":
        places, advantage = extremes(groups, size)
    else:
        rng = np.random.default_rng([stream_seed(seed, "kept images"), batch.iteration])
        places, advantage = drawn(groups, size, rng.random((2, len(groups))))
    places = places + np.arange(len(groups))[:, None] * batch.group_size
    chosen = torch.from_numpy(places.flatten()), torch.from_numpy(advantage.flatten().astype(np.float32))
    return batch.among(*chosen, size)


def extremes(advantage: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The best and the worst of each group, as many of both.

    Args:
        advantage: (P, G).
        size: k, even and less than G.

    Returns:
        (P, k) positions in the groups, which rise, and their advantages, centred again.
    """
    order = np.argsort(advantage, axis=1, kind="stable")
    places = np.sort(np.concatenate([order[:, : size // 2], order[:, -(size // 2) :]], axis=1), axis=1)
    values = np.take_along_axis(advantage, places, axis=1)
    return places, values - values.mean(axis=1, keepdims=True)


def drawn(advantage: np.ndarray, size: int, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A systematic draw of k/2 better and k/2 worse images of each group, in proportion to |A|.

    The |A| of a side lie end to end on a line; k/2 points at equal distances on it, moved by `shift` of one distance,
    hit the images that are kept. A group whose advantages are all 0 keeps its first k images.

    Args:
        advantage: (P, G).
        size: k, even and less than G.
        shift: (2, P) uniform in [0, 1), of the better and of the worse.

    Returns:
        (P, k) positions in the groups, which never fall, and their advantages.
    """
    half = size // 2
    places = np.tile(np.arange(size), (len(advantage), 1))
    values = np.zeros(places.shape)
    for row, group in enumerate(advantage):
        if not group.any():
            continue
        sides = group.clip(min=0), -group.clip(max=0)
        hit = np.concatenate([_hit(side, half, moved) for side, moved in zip(sides, shift[:, row], strict=True)])
        weight = [2 * sign * side.mean() for sign, side in zip((1, -1), sides, strict=True)]
        order = np.argsort(hit, kind="stable")
        places[row], values[row] = hit[order], np.repeat(weight, half)[order]
    return places, values


def _hit(length: np.ndarray, count: int, shift: float) -> np.ndarray:
    """(count,) which of the pieces `length` (G,) of a line the points hit; see `drawn`."""
    ends = length.cumsum()
    points = (np.arange(count) + shift) / count * ends[-1]
    # Rounding may move the last point to the line's end.
    return np.searchsorted(ends, points, side="right").clip(max=np.flatnonzero(length)[-1])
