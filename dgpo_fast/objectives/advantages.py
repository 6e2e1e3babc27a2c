"""How rewards become advantages."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.rewards import GroupScores
from dgpo_fast.rewards.group_log import are_equal

ADVANTAGE_EPS = 1e-4


def advantages_of(
    scores: GroupScores, weights: Mapping[str, float], config: Advantage, everyone: np.ndarray | None = None
) -> Tensor:
    """Advantages of the groups that could be scored, (P'·G,) fp32 on the CPU, as `config.of` says.

    Args:
        scores: of P groups.
        weights: of the rewards, by name.
        everyone: as for `advantages`.
    """
    if config.of == "sum":
        return advantages(scores.rewards[scores.valid], config, everyone)
    return advantages_of_each({name: scores.parts[name][scores.valid] for name in weights}, weights, config)


def advantages_of_each(rewards: Mapping[str, np.ndarray], weights: Mapping[str, float], config: Advantage) -> Tensor:
    """A = Σ_k w_k · A_k / std, where A_k = (r_k − mean of the group) / std_k is of reward k alone (after GDPO).

    A_k is exactly 0 in a group in which the reward is equal, and in one whose prompt did not ask for it. std is that of
    the sum in the iteration's groups that prefer something. A group with an advantage above `config.clamp` is scaled
    down as a whole: the advantages of every group sum to zero.

    Args:
        rewards: (P, G) by name, of whole groups; NaN if a group's prompt did not ask for a reward.
        weights: by the same names.

    Returns:
        (P·G,) fp32 advantages on the CPU.
    """
    total = np.zeros(next(iter(rewards.values())).shape)
    for name, scores in rewards.items():
        known = np.isfinite(scores).all(axis=1)
        asked = scores[known].astype(np.float64)
        if len(asked) == 0:
            continue
        centred = asked - asked.mean(axis=1, keepdims=True)
        centred[are_equal(asked)] = 0.0
        std = asked.std(axis=1 if config.std == "group" else None, keepdims=True)
        total[known] += weights[name] * np.divide(centred, std, out=np.zeros_like(centred), where=centred != 0)
    prefer = total[(total != 0).any(axis=1)]
    if len(prefer):
        total = total / prefer.std()
    if config.clamp is not None:
        largest = np.abs(total).max(axis=1, keepdims=True)
        total = total * (config.clamp / np.maximum(largest, config.clamp))
    return torch.from_numpy((total * config.scale).astype(np.float32).reshape(-1))


def advantages(rewards: np.ndarray, config: Advantage, everyone: np.ndarray | None = None) -> Tensor:
    """A = (r − mean of the group) / (std + 1e-4), clamped and scaled; not divided if `config.std` is off.

    Args:
        rewards: (P, G) rewards of whole groups, all finite.
        everyone: (N,) all rewards of the iteration, if there are groups of other sizes too.

    Returns:
        (P·G,) fp32 advantages on the CPU. A group whose rewards are all equal gets exact zeros.
    """
    centred = rewards.astype(np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    # The mean of equal numbers may differ from them in the last bit; dividing that by a tiny std would make noise of
    # it.
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    if config.std != "off":
        among = rewards if config.std == "group" or everyone is None else everyone
        axis = 1 if config.std == "group" else None
        centred = centred / (among.std(axis=axis, keepdims=True, dtype=np.float64) + ADVANTAGE_EPS)
    if config.clamp is not None:
        centred = np.clip(centred, -config.clamp, config.clamp)
    scaled = centred * config.scale
    return torch.from_numpy(scaled.astype(np.float32).reshape(-1))
