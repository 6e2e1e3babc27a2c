"""Rewards: one small protocol, a registry by name, and weighted sums scored group by group."""

from dgpo_fast.rewards.protocol import Reward
from dgpo_fast.rewards.weighted import GroupScores, WeightedReward, load_rewards

__all__ = ["GroupScores", "Reward", "WeightedReward", "load_rewards"]
