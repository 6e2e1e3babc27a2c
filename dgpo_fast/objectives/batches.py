"""From an iteration's scored groups to the batches that an objective learns from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dgpo_fast.config.options import Config
from dgpo_fast.distributed import Processes
from dgpo_fast.distributed.batch_part import part_of
from dgpo_fast.objectives.advantages import advantages_of
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.kept import kept
from dgpo_fast.objectives.kl_term import gates
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.rollout.source import Groups


@dataclass(frozen=True, eq=False)
class BatchMaker:
    """Makes the batches of one process.

    Attributes:
        config: the run's.
        weights: of the rewards, by name.
        schedule: the rollout's grid.
        processes: those that share the run.
        device: this process's.
        sharded: whether weights are.
    """

    config: Config
    weights: Mapping[str, float]
    schedule: Schedule
    processes: Processes
    device: torch.device
    sharded: bool

    def __call__(self, collected: Sequence[Groups], iteration: int) -> list[Batch]:
        """The process's samples of the groups that could be scored, with their advantages: those that are kept, in a
        batch for each size of groups."""
        rewards = np.concatenate([groups.scores.rewards[groups.scores.valid].reshape(-1) for groups in collected])
        batches, first_group, first_sample = [], 0, 0
        for groups in collected:
            if groups.scores.valid.any():
                batches.append(self._batch(groups, rewards, iteration, first_group, first_sample))
            first_group, first_sample = first_group + len(groups.prompts), first_sample + groups.scores.rewards.size
        return batches

    def _batch(self, groups: Groups, rewards: np.ndarray, iteration: int, first_group: int, first_sample: int) -> Batch:
        """Of groups of one size, numbered from the first ones on; `rewards` are those of all sizes."""
        scores, share = groups.scores, groups.share
        advantage = groups.advantage
        if advantage is None:
            advantage = advantages_of(scores, self.weights, self.config.advantage, rewards)
        gate = gates(scores, advantage, self.config.regulariser.kl_gate)
        valid = np.repeat(scores.valid, share.group_size)[share.start : share.stop]
        rows = torch.from_numpy(np.flatnonzero(valid)).to(self.device)
        part = part_of(
            scores.valid,
            advantage,
            share.group_size,
            self.processes,
            f"the group scores of iteration {iteration + 1}",
            sharded=self.sharded,
        )
        sample_index = torch.arange(share.start, share.stop, device=self.device)
        drawn = Batch(
            iteration=iteration if groups.number is None else groups.number,
            x0=groups.x0,
            text=groups.text,
            advantage=torch.zeros(len(share), device=self.device),
            group_index=first_group + sample_index // share.group_size,
            sample_index=first_sample + sample_index,
            group_size=share.group_size,
            schedule=self.schedule,
            transitions=groups.transitions,
            kl_gate=None if gate is None else gate.flatten()[share.start : share.stop].to(self.device),
        )
        return kept(drawn.taken(rows, part), self.config.advantage, self.config.seed)
