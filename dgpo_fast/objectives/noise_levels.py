"""Draws of noise levels σ for objectives that are means over levels.

A draw is a function of the run's seed, the iteration and, if samples differ in σ, the key of the sample's noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from dgpo_fast.config.objective_options import Levels, grid_steps
from dgpo_fast.objectives.levels import Level, draw_training_steps
from dgpo_fast.rollout.schedule import Schedule, shifted
from dgpo_fast.seeds import stream_seed

LOWEST_UNIFORM = 0.2
"""σ of the "uniform" levels, as in the release of Advantage Weighted Matching."""


@dataclass(frozen=True)
class NoiseLevels:
    """M noise levels of each sample of an iteration.

    Attributes:
        kind: how they are drawn (`nft.levels` says what each kind is).
        count: M; None: all steps of the grid that there are.
        seed: the run's.
        shift: of the rollout's grid; only "logit_normal" needs it.
        lowest: of the "uniform" levels.
    """

    kind: Levels
    count: int | None
    seed: int
    shift: float | None = None
    lowest: float = LOWEST_UNIFORM

    def draw(self, iteration: int, schedule: Schedule, key: Tensor) -> list[Level]:
        """The levels of `iteration`.

        Args:
            iteration: counted from 0.
            schedule: the rollout's grid.
            key: (B,) int64, of the samples' noise. Levels that are not on the grid are equal for equal keys.
        """
        steps = grid_steps(self.kind, schedule.steps)
        if steps is None:
            assert self.count is not None
            numbers = range(iteration * self.count, (iteration + 1) * self.count)
            return [self._free(slot, draw, key) for slot, draw in enumerate(numbers)]
        chosen = self._chosen(iteration, steps)
        return [
            Level(schedule.sigmas[step], schedule.timesteps[step], iteration * len(chosen) + slot)
            for slot, step in enumerate(chosen)
        ]

    def _chosen(self, iteration: int, steps: range) -> list[int]:
        """Of `steps`, those of an iteration: all different."""
        count = self.count or len(steps)
        if self.kind == "grid":
            return draw_training_steps(iteration, count=count, among=len(steps), seed=self.seed)
        rng = np.random.default_rng([stream_seed(self.seed, "timesteps"), iteration])
        edges = [steps.start + len(steps) * part // count for part in range(count + 1)]
        return [int(step) for step in rng.integers(edges[:-1], edges[1:])]

    def _free(self, slot: int, draw: int, key: Tensor) -> Level:
        normal = philox_normal((1,), key, seed=stream_seed(self.seed, "noise levels"), draw=draw)[:, 0]
        assert self.count is not None
        sigma = QUANTILES[self.kind](torch.special.ndtr(normal), slot, self.count)
        if self.kind == "logit_normal":
            assert self.shift is not None, "the grid's shift is still to be read"
            sigma = shifted(sigma, self.shift)
        if self.kind == "uniform":
            sigma = self.lowest + (1 - self.lowest) * sigma
        return Level(sigma, 1000 * sigma, draw)


def _uniform(share: Tensor, slot: int, count: int) -> Tensor:
    return (slot + share) / count


def _linear(share: Tensor, slot: int, count: int) -> Tensor:
    return share.sqrt()


def _logit_normal(share: Tensor, slot: int, count: int) -> Tensor:
    return torch.sigmoid(torch.special.ndtri((slot + share) / count))


QUANTILES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "uniform": _uniform,
    "linear": _linear,
    "logit_normal": _logit_normal,
}
"""σ (B,) of level `slot` of `count` from a uniform draw (B,) in [0, 1], before "uniform" is moved off its lowest σ and
"logit_normal" is shifted."""
