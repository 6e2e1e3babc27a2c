"""Which objective learns most: at equal seconds, at equal forwards, and at equal distance from the base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.compare.curves import at, mean_interval, reach
from benchmarks.compare.findings import Finding, signed
from benchmarks.compare.systems import SYSTEMS

BUDGETS = ("training_s", "training_forwards")
NAMES = {"training_s": "seconds", "training_forwards": "forwards"}


@dataclass(frozen=True)
class Rivals:
    """Final runs of several systems, whose seeds are the same.

    Attributes:
        runs: results of each system's final runs, in the order of the seeds.
        base: scores of the model as it came.
    """

    runs: Mapping[str, Sequence[Mapping[str, Any]]]
    base: Mapping[str, Any]

    def budget(self, spent: str) -> float:
        """The most that every run has spent."""
        if spent == "training_s":
            return min(run["run"]["seconds"] for runs in self.runs.values() for run in runs)
        return min(reach(runs, spent) for runs in self.runs.values())

    def distance(self) -> float:
        """A distance from the base that half of the systems come to, with all seeds."""
        return float(np.median([reach(runs, "distance") for runs in self.runs.values()]))

    def rewards(self, system: str, spent: str, amount: float) -> np.ndarray:
        """(seeds,) rewards of a system where `amount` was spent."""
        where = np.array([amount])
        return np.array([at(where, run, self.base, "reward_mean", spent)[0] for run in self.runs[system]])

    def findings(self) -> list[Finding]:
        """Who wins by each budget, and the first system against each other one."""
        first, *others = self.runs
        return [*(self.winner(spent) for spent in BUDGETS), *(self.pair(first, other) for other in others)]

    def winner(self, spent: str) -> Finding:
        """The system with the highest mean reward at equal budgets, and what is not apart from it."""
        amount = self.budget(spent)
        rewards = {system: self.rewards(system, spent, amount) for system in self.runs}
        order = sorted(rewards, key=lambda system: rewards[system].mean(), reverse=True)
        best, behind = order[0], {name: mean_interval(rewards[order[0]] - rewards[name]) for name in order[1:]}
        close = [name for name, (difference, half) in behind.items() if not difference - half > 0]
        ranking = ", ".join(f"{SYSTEMS[name].label} {rewards[name].mean():.3f}" for name in order)
        if close:
            apart = "Not apart from the first: " + ", ".join(
                f"{SYSTEMS[name].label} ({signed(*behind[name], 3)})" for name in close
            )
        else:
            apart = f"{SYSTEMS[best].label} is apart from each of the others"
        return Finding(
            f"most reward at equal {NAMES[spent]}",
            "open" if close else SYSTEMS[best].label,
            f"After {amount_in_words(spent, amount)}: {ranking} (the base: {self.base['reward_mean']:.3f}). {apart}.",
            {
                "amount": amount,
                "rewards": {name: mean_interval(values) for name, values in rewards.items()},
                "behind": behind,
            },
        )

    def pair(self, first: str, other: str) -> Finding:
        """The reward of `first` minus that of `other`, seed by seed, by each budget and at equal distance."""
        ours, theirs = SYSTEMS[first].label, SYSTEMS[other].label
        amounts = {spent: self.budget(spent) for spent in BUDGETS}
        amounts["distance"] = min(reach(self.runs[name], "distance") for name in (first, other))
        found = {
            spent: mean_interval(self.rewards(first, spent, amount) - self.rewards(other, spent, amount))
            for spent, amount in amounts.items()
        }
        difference, half = found["training_s"]
        verdict = "open"
        if abs(difference) > half:
            verdict = f"{ours if difference > 0 else theirs} is ahead"
        parts = [f"{signed(*found[spent], 3)} after {amount_in_words(spent, amounts[spent])}" for spent in amounts]
        sentence = f"The reward of {ours} minus that of {theirs} is {parts[0]}, {parts[1]}, and {parts[2]}."
        numbers = {spent: {"amount": amounts[spent], "difference": found[spent]} for spent in amounts}
        return Finding(f"{ours} against {theirs}", verdict, sentence, numbers)

    def table(self) -> str:
        """Rewards at equal budgets and at one distance from the base, as Markdown."""
        amounts = {spent: self.budget(spent) for spent in BUDGETS} | {"distance": self.distance()}
        heads = [f"reward after {amount_in_words(spent, amount)}" for spent, amount in amounts.items()]
        rows = [f"| system | {' | '.join(heads)} |", "|---|---|---|---|"]
        for system, runs in self.runs.items():
            cells = [
                interval(self.rewards(system, spent, amount), 3) if reach(runs, spent) >= amount else "not reached"
                for spent, amount in amounts.items()
            ]
            rows.append(f"| {SYSTEMS[system].label} | {' | '.join(cells)} |")
        return "\n".join(rows)


def amount_in_words(spent: str, amount: float) -> str:
    """A budget or a distance with its unit."""
    if spent == "distance":
        return f"a distance of {amount:.3g} from the base"
    return f"{amount:.0f} s" if spent == "training_s" else f"{amount / 1000:.0f} thousand forwards"


def interval(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """Their mean and half the width of its interval."""
    return signed(*mean_interval(values), digits).removeprefix("+")
