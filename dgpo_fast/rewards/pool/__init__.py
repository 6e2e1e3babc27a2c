"""Rewards scored beside the rollouts, in threads and worker processes."""
