"""What a process must know of the others to compute its own samples.

If weights are sharded, a block is whole only while all processes compute it: they must make equally many forwards.
Processes with fewer samples therefore fill up with rows of weight 0, copies of their first one. `filled` does it for
images to draw, and `BatchPart.missing` says how many rows a batch to learn from needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.distributed.placement import shares
from dgpo_fast.distributed.processes import ALONE, Processes


@dataclass(frozen=True)
class BatchPart:
    """The position of a process's samples among the P·G of all processes, numbered group after group.

    Attributes:
        first: position of the process's first sample.
        groups: P, of all processes together.
        group_size: G.
        advantage: (P·G,) fp32 of all samples, on the CPU.
        split: whether any group is held by several processes; the same on all of them.
        processes: those that share the iteration.
        what: named in the error if the others do not come.
        edges: with sharded weights, the position of every process's first sample, and the end.
    """

    first: int
    groups: int
    group_size: int
    advantage: Tensor
    split: bool = False
    processes: Processes = ALONE
    what: str = "the group scores"
    edges: tuple[int, ...] | None = None

    @property
    def samples(self) -> int:
        """P·G."""
        return self.groups * self.group_size

    @property
    def in_step(self) -> bool:
        """Whether the processes wait for one another while they learn: they share groups, or weights."""
        return self.split or self.edges is not None

    def missing(self, own: int) -> int:
        """Rows of weight 0 that this process needs beside its `own` samples; 0 unless weights are sharded."""
        return 0 if self.edges is None else max(stop - start for start, stop in pairwise(self.edges)) - own

    @property
    def before(self) -> int:
        """Samples of the process's first group that stand before its own."""
        return self.first % self.group_size

    def groups_of(self, own: int) -> int:
        """Groups that the process's `own` samples are of, in whole or in part; the most of any process if weights are
        sharded."""
        if self.edges is None:
            return -(-(self.before + own) // self.group_size)
        size = self.group_size
        return max(-(-stop // size) - start // size for start, stop in pairwise(self.edges) if stop > start)

    def rows(self, start: int, stop: int, count: int) -> slice:
        """Which of the process's `count` samples lie at the positions [start, stop)."""
        return slice(min(max(start - self.first, 0), count), min(max(stop - self.first, 0), count))

    def only(self, start: int, stop: int) -> "BatchPart":
        """The part for the whole groups at the positions [start, stop)."""
        return replace(
            self,
            first=max(self.first - start, 0),
            groups=(stop - start) // self.group_size,
            advantage=self.advantage[start:stop],
            edges=None if self.edges is None else tuple(min(max(e, start), stop) - start for e in self.edges),
        )

    def chosen(self, positions: Tensor, advantage: Tensor, group_size: int) -> "BatchPart":
        """The same among the samples at `positions`, which never fall: groups of `group_size` with `advantage`."""

        def count_before(edge: int) -> int:
            return int((positions < edge).sum())

        return replace(
            self,
            first=count_before(self.first),
            group_size=group_size,
            advantage=advantage,
            edges=None if self.edges is None else tuple(map(count_before, self.edges)),
        )

    def sum_group_scores(self, score: Tensor) -> Tensor:
        """Group scores of the process's samples (B,), each summed over the processes that hold a part of its group.

        All processes must call it equally often, even without samples.
        """
        if not self.split:
            return score
        groups = torch.arange(self.first, self.first + len(score), device=score.device) // self.group_size
        whole = score.new_zeros(self.groups)
        whole[groups] = score  # equal within a group
        return self.processes.sum(whole, self.what)[groups]


def part_of(
    scored: np.ndarray, advantage: Tensor, group_size: int, processes: Processes, what: str, *, sharded: bool
) -> BatchPart:
    """This process's part of an iteration's groups.

    Args:
        scored: (P,) bool, which groups could be scored; the others are left out.
        advantage: (P'·G,) fp32 of the samples of the scored groups, on the CPU.
        group_size: G.
        processes: those that share the iteration.
        what: as `BatchPart.what`.
        sharded: whether weights are.
    """
    everyone, samples = shares(len(scored), group_size, processes.count), np.repeat(scored, group_size)
    starts = tuple(int(samples[: share.start].sum()) for share in everyone)
    return BatchPart(
        first=starts[processes.rank],
        groups=int(scored.sum()),
        group_size=group_size,
        advantage=advantage,
        split=any(not share.whole for share in everyone),
        processes=processes,
        what=what,
        edges=(*starts, int(samples.sum())) if sharded else None,
    )


def filled(ranges: Sequence[range], rank: int, *, sharded: bool) -> list[int]:
    """The numbers of process `rank`; if weights are `sharded`, its first one again until there are as many as anywhere.

    Args:
        ranges: of each process; none is empty.
    """
    own = ranges[rank]
    return [*own, *[own.start] * (max(map(len, ranges)) - len(own) if sharded else 0)]
