"""How rewards become advantages."""

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.config.objective_options import Advantage

ADVANTAGE_EPS = 1e-4


def advantages(rewards: np.ndarray, config: Advantage) -> Tensor:
    """A = (r − mean of the group) / (std + 1e-4), clamped and scaled; not divided if `config.std` is off.

    Args:
        rewards: (P, G) rewards of whole groups, all finite.

    Returns:
        (P·G,) fp32 advantages on the CPU. A group whose rewards are all equal gets exact zeros.
    """
    centred = rewards.astype(np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    # The mean of equal numbers may differ from them in the last bit; dividing that by a tiny std would make noise of
    # it.
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    if config.std != "off":
        axis = 1 if config.std == "group" else None
        centred = centred / (rewards.std(axis=axis, keepdims=True, dtype=np.float64) + ADVANTAGE_EPS)
    if config.clamp is not None:
        centred = np.clip(centred, -config.clamp, config.clamp)
    scaled = centred * config.scale
    return torch.from_numpy(scaled.astype(np.float32).reshape(-1))
