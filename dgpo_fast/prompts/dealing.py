"""Which prompts, or groups drawn from them, an iteration gets."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

from dgpo_fast.seeds import stream_seed

T = TypeVar("T")


class GroupSampler(Generic[T]):
    """Deals out the training prompts, or groups drawn from them, `groups` per iteration, reshuffled in every pass.

    Args:
        items: what is dealt out.
        groups: P, items per iteration.
        seed: the run's seed.
        stream: name of the stream of draws.
    """

    def __init__(self, items: Sequence[T], groups: int, seed: int, stream: str = "prompts"):
        self.items = items
        self.groups = groups
        self.seed = stream_seed(seed, stream)

    def draw(self, iteration: int) -> list[T]:
        """The P items of iteration `iteration`, counted from 0."""
        positions = range(iteration * self.groups, (iteration + 1) * self.groups)
        orders = {epoch: self._order(epoch) for epoch in {p // len(self.items) for p in positions}}
        return [self.items[orders[p // len(self.items)][p % len(self.items)]] for p in positions]

    def all_drawn(self, iterations: range) -> list[T]:
        """The items of `iterations`, in the order of their first use; some may be there twice."""
        start, count = iterations.start * self.groups, len(self.items)
        # The rest of a pass and a whole one after it hold every item.
        stop = min(iterations.stop * self.groups, (start // count + 2) * count)
        drawn: list[T] = []
        for epoch in range(start // count, -(-stop // count)):
            order = self._order(epoch)[max(start - epoch * count, 0) : stop - epoch * count]
            drawn += [self.items[index] for index in order]
        return drawn

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))


def spread(items: Sequence[T], kind: Callable[[T], Hashable]) -> list[T]:
    """The same items in an order in which the first n hold n/N of each kind, for every n, within less than one item.

    Processes hold consecutive groups. If prompts have rewards of their own, some of which take longer than others,
    every share then has its part of each kind, within less than two groups, at any number of processes and whatever the
    rewards take. Tijdeman, "The chairman assignment problem" (1980): of the kinds that are due, the one whose next item
    may wait the least.
    """
    kinds: dict[Hashable, deque[T]] = defaultdict(deque)
    for item in items:
        kinds[kind(item)].append(item)
    if len(kinds) == 1:
        return list(items)
    counts, total, slack = {key: len(of_kind) for key, of_kind in kinds.items()}, len(items), 2 * len(kinds) - 2
    ordered: list[T] = []
    for place in range(1, total + 1):
        dealt = {key: counts[key] - len(of_kind) for key, of_kind in kinds.items()}
        due = [key for key in kinds if slack * (place * counts[key] - total * dealt[key]) >= total]
        ordered.append(kinds[min(due, key=lambda key: (slack * (dealt[key] + 1) - 1) / counts[key])].popleft())
    return ordered
