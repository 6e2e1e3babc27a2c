"""Which prompts and timesteps an iteration uses, and how rewards become advantages.

Every draw is a function of (seed, stream, position) alone. No generator carries state from one iteration to the next,
so a resumed run and a run on other processes draw what an undisturbed one draws.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dgpo_fast.config import Advantage

T = TypeVar("T")
ADVANTAGE_EPS = 1e-4


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for one named stream of draws; different streams of one run are independent."""
    digest = hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class GroupSampler(Generic[T]):
    """Deals the training prompts, or groups drawn from them, out, `groups` an iteration, reshuffled at every pass.

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

    Processes hold consecutive groups. Where prompts have rewards of their own, some of which take longer than others,
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


def draw_training_steps(iteration: int, *, count: int, among: int, seed: int) -> list[int]:
    """`count` different step indices out of the first `among` of the rollout's grid, the noisiest ones."""
    rng = np.random.default_rng([stream_seed(seed, "timesteps"), iteration])
    return [int(step) for step in rng.choice(among, size=count, replace=False)]


def advantages(rewards: np.ndarray, config: Advantage) -> Tensor:
    """A = (r − mean of the group) / (std + 1e-4), clamped.

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
    std = (
        rewards.std(axis=1, keepdims=True, dtype=np.float64)
        if config.std == "group"
        else np.std(rewards, dtype=np.float64)
    )
    scaled = np.clip(centred / (std + ADVANTAGE_EPS), -config.clamp, config.clamp)
    return torch.from_numpy(scaled.astype(np.float32).reshape(-1))
