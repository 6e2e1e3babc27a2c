"""Rewards: one small protocol, a registry by name, and weighted sums scored group by group."""

from dgpo_fast.rewards.pool.pool import RewardPool, count_workers
from dgpo_fast.rewards.protocol import Reward
from dgpo_fast.rewards.weighted import GroupScores, WeightedReward, load_rewards

__all__ = ["GroupScores", "Reward", "RewardPool", "WeightedReward", "count_workers", "load_rewards"]
