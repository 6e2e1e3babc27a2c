"""Which samples of an iteration belong to which process.

The P·G samples of an iteration are numbered group after group. A process gets consecutive ones, so a share is a range.
Every draw is keyed by these numbers, never by the process. A share only depends on three counts, so every process
knows all shares.
"""

import math
from dataclasses import dataclass

from dgpo_fast.errors import UserError


@dataclass(frozen=True)
class Share:
    """The samples [start, stop) of an iteration with groups of `group_size`."""

    start: int
    stop: int
    group_size: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """(group, first, end) of each group that the share holds samples of, in the numbers of all samples."""
        size = self.group_size
        groups = range(self.start // size, -(-self.stop // size)) if len(self) else range(0)
        return [(group, max(self.start, group * size), min(self.stop, (group + 1) * size)) for group in groups]

    @property
    def piece_size(self) -> int:
        """The largest size of which every part of a group in the share is a multiple; G if groups are whole."""
        return math.gcd(*(end - first for _, first, end in self.parts))

    @property
    def pieces(self) -> range:
        """The first sample of each piece: groups, or what is held of them, in pieces of one size to be scored."""
        return range(self.start, self.stop, self.piece_size)

    @property
    def whole(self) -> bool:
        """Whether no group of the share is held by another process too."""
        return self.start % self.group_size == 0 and self.stop % self.group_size == 0


def place(groups: int, group_size: int, processes: int) -> list[Share]:
    """The share of each process.

    If there is at least one group per process, shares are whole groups. They differ by at most one group, and the loss
    needs no communication. With fewer groups than processes, samples are dealt out evenly and groups are split.

    Args:
        groups: P ≥ 1.
        group_size: G ≥ 1.
        processes: ≥ 1.

    Raises UserError if a process would be without work.
    """
    samples = groups * group_size
    if processes > samples:
        raise UserError(
            f"{processes} processes share {samples} images an iteration: raise --rollout.groups or "
            f"--rollout.group-size, or start {samples} processes at most"
        )
    return shares(groups, group_size, processes)


def shares(groups: int, group_size: int, processes: int) -> list[Share]:
    """As `place`; some are empty if there are fewer samples than processes."""
    unit = group_size if groups >= processes else 1
    return [Share(start, stop, group_size) for start, stop in even_ranges(groups * group_size, processes, unit)]


def largest_share(groups: int, group_size: int, processes: int) -> int:
    """Samples of the process that has most of them; see `place`."""
    if groups >= processes:
        return -(-groups // processes) * group_size
    return -(-groups * group_size // processes)


def even_ranges(total: int, processes: int, unit: int = 1) -> list[tuple[int, int]]:
    """[0, total) cut into one range for each process, at multiples of `unit`; lengths differ by a unit at most.

    The first ranges are the longer ones; the last ones are empty if there are fewer units than processes.
    """
    units = -(-total // unit)
    edges = [min((units * rank + processes - 1) // processes * unit, total) for rank in range(processes + 1)]
    return [(edges[rank], edges[rank + 1]) for rank in range(processes)]
