"""Curves of several seeds as one: means, intervals, and when a level is reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

GRID = 241


@dataclass(frozen=True)
class Curve:
    """One measure of one system over training, a row per seed.

    Attributes:
        x: (N,) what was spent: seconds or images.
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
    """`measure` of a system's final runs against what was `spent`, from 0 to `until`.

    Between evaluations it is a straight line. The drawing of data, before training, changes nothing.
    """
    x = np.linspace(0.0, until, GRID)
    rows = []
    for run in runs:
        knots = [(0.0, base[measure])]
        if spent == "training_s":
            knots.append((run["source"]["drawing_s"], base[measure]))
        knots += [(point[spent], point[measure]) for point in run["points"]]
        rows.append(np.interp(x, *np.array(knots, dtype=float).T))
    return Curve(x, np.array(rows))


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN for one value."""
    numbers = np.asarray(values, dtype=float)
    count = len(numbers)
    if count < 2:
        return float(numbers.mean()), float("nan")
    half = stats.t.ppf(0.975, count - 1) * numbers.std(ddof=1) / np.sqrt(count)
    return float(numbers.mean()), float(half)
