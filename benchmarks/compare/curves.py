"""Curves of several seeds as one: means, intervals, and when a level is reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

GRID = 241
AT_THE_START = {"training_s": "drawing_s", "training_forwards": "drawing_forwards"}
"""What the drawing of data, before training, takes of a budget."""


@dataclass(frozen=True)
class Curve:
    """One measure of one system over training, a row per seed.

    Attributes:
        x: (N,) what was spent: seconds, forwards or images; or the distance from the base.
        values: (seeds, N) the measure there.
    """

    x: np.ndarray
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(N,) over the seeds."""
        return self.values.mean(0)

    @property
    def half(self) -> np.ndarray:
        """(N,) half the width of the mean's 95 % interval over the seeds."""
        return np.array([mean_interval(column)[1] for column in self.values.T])

    def best(self) -> tuple[float, float]:
        """What was spent and the mean where the mean is highest."""
        index = int(self.mean.argmax())
        return float(self.x[index]), float(self.mean[index])

    def reaches(self, level: float) -> float | None:
        """What is spent when the mean first is `level`; None if it never is."""
        above = np.flatnonzero(self.mean >= level)
        return float(self.x[above[0]]) if len(above) else None

    def resampled(self, rng: np.random.Generator) -> "Curve":
        """The same with seeds drawn with replacement."""
        return Curve(self.x, self.values[rng.integers(len(self.values), size=len(self.values))])


def curve(runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any], measure: str, spent: str, until: float) -> Curve:
    """`measure` of a system's final runs against what was `spent`, from 0 to `until`; see `at`."""
    x = np.linspace(0.0, until, GRID)
    return Curve(x, np.array([at(x, run, base, measure, spent) for run in runs]))


def at(x: np.ndarray, run: Mapping[str, Any], base: Mapping[str, Any], measure: str, spent: str) -> np.ndarray:
    """`measure` of a run where `x` (N,) was `spent`, (N,).

    Between evaluations it is a straight line. The drawing of data, before training, changes nothing. A `distance` may
    fall again: the measure is that where the run first was as far.
    """
    knots = [(0.0, base[measure])]
    if spent in AT_THE_START:
        knots.append((run["source"][AT_THE_START[spent]], base[measure]))
    for point in run["points"]:
        if spent != "distance" or point[spent] > knots[-1][0]:
            knots.append((point[spent], point[measure]))
    return np.interp(x, *np.array(knots, dtype=float).T)


def reach(runs: Sequence[Mapping[str, Any]], spent: str) -> float:
    """The most `spent` that all `runs` have come to."""
    return min(max(point[spent] for point in run["points"]) for run in runs)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN for one value."""
    numbers = np.asarray(values, dtype=float)
    count = len(numbers)
    if count < 2:
        return float(numbers.mean()), float("nan")
    half = stats.t.ppf(0.975, count - 1) * numbers.std(ddof=1) / np.sqrt(count)
    return float(numbers.mean()), float(half)
