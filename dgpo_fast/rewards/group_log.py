"""Metrics of an iteration's scored groups, notes to the user, and the end of a run that can learn from none."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dgpo_fast.distributed import SharedError
from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.prompts import Prompt
from dgpo_fast.records import Metrics
from dgpo_fast.rewards import GroupScores, WeightedReward
from dgpo_fast.wording import counted, resume_command

EQUAL_TOLD = 3
"""Iterations in a row of equal rewards alone, after which a user is told."""


EQUAL_TO = 1e-5
"""Scores of a group that differ by less than this share of the largest one are equal: float32 has seven digits."""


class GroupLog:
    """Gets the scored groups of each iteration in turn.

    Args:
        reward: what scores them; None if people have.
        most_lost: iterations in a row in which a reward, or all rewards, score nothing before the run ends.
        dtype: of the model's forwards.
        note: called with each line for the user.
    """

    def __init__(self, reward: WeightedReward | None, most_lost: int, dtype: torch.dtype, note: Callable[[str], None]):
        self._reward, self._most_lost, self._dtype, self._note = reward, most_lost, dtype, note
        self._lost_in_a_row: Counter[str] = Counter()
        self._equal_in_a_row: int | None = 0  # None once it was told

    def take(self, iteration: int, prompts: Sequence[Prompt], scores: GroupScores, folder: Path | None) -> Metrics:
        """Metrics of an iteration's groups; notes the dropped ones.

        Args:
            iteration: the number that messages give it.
            prompts: one per group.
            scores: theirs, of all processes.
            folder: the run's, which messages name; None if it has none.

        Raises SharedError if every group has a picture that is not finite, if a reward has scored nothing, on any
        process, for too many iterations in a row among those whose prompts use it, or if no group could be scored for
        as many.
        """
        if not scores.finite.any():
            raise SharedError(
                f"iteration {iteration}: every group has pictures that are not finite; the first: "
                f"{scores.failures[0]}: {finite_remedy(self._dtype, begun=iteration > 1)}"
            )
        for line in scores.failures:
            self._note(f"iteration {iteration}: group dropped: {line}")
        shown = [prompt for prompt, finite in zip(prompts, scores.finite, strict=True) if finite]
        names: list[str] = []
        asked: dict[str, None] = {}
        if self._reward is not None:
            names = list(self._reward.rewards)
            asked = dict.fromkeys(name for prompt in shown for name in self._reward.chosen(prompt))
        for name in asked:
            self._count_lost(f"reward {name!r}", bool(np.isfinite(scores.parts[name]).any()), scores.failures, folder)
        self._count_lost("", bool(scores.valid.any()), scores.failures, folder)
        metrics = _metrics(scores, names)
        self._count_equal(metrics["groups_equal_count"], int(scores.valid.sum()))
        return metrics

    def _count_equal(self, equal: int, scored: int) -> None:
        """Counts iterations in a row in which all scored groups have equal rewards, and notes once what that means."""
        if self._equal_in_a_row is None or not scored:
            return
        self._equal_in_a_row = self._equal_in_a_row + 1 if equal == scored else 0
        if self._equal_in_a_row == EQUAL_TOLD:
            self._equal_in_a_row = None
            self._note(
                f"every group of {EQUAL_TOLD} iterations in a row had equal rewards: nothing can be learned "
                "from them; check whether the reward distinguishes the pictures of a prompt"
            )

    def _count_lost(self, reward: str, has_scored: bool, failures: list[str], folder: Path | None) -> None:
        """Counts iterations in a row in which a reward, named as in its `failures`, scored nothing; an empty name is
        for all rewards."""
        lost = self._lost_in_a_row[reward] = 0 if has_scored else self._lost_in_a_row[reward] + 1
        if lost < self._most_lost:
            return
        in_a_row = f"{counted(lost, 'iteration')} in a row"
        what = f"{reward} scored nothing in {in_a_row}" if reward else f"no group of {in_a_row} could be scored"
        last = [line for line in failures if line.startswith(reward)][-1]
        go_on = f", then resume with: {resume_command(folder)}" if folder else ""
        raise SharedError(f"{what}; the last failure: {last}; fix the reward{go_on}")


def joined(parts: Sequence[Metrics]) -> Metrics:
    """One iteration's metrics from those of its groups of each size: counts are added, the others are means over
    images."""
    if len(parts) == 1:
        return parts[0]
    found: Metrics = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        known = [(part[name], part["images_count"]) for part in parts if part.get(name) is not None]
        if name.endswith("_count"):
            found[name] = sum(value for value, _ in known)
        else:
            found[name] = sum(value * images for value, images in known) / sum(i for _, i in known) if known else None
    return found


def _metrics(scores: GroupScores, rewards: Sequence[str]) -> Metrics:
    kept = scores.rewards[scores.valid].astype(np.float64)
    equal = np.ptp(kept, axis=1) == 0 if kept.size else np.zeros(0, bool)
    metrics: Metrics = {
        "reward_mean": float(kept.mean()) if kept.size else None,
        "reward_std": float(kept.std()) if kept.size else None,
        "reward_group_std": float(kept.std(axis=1).mean()) if kept.size else None,
        "groups_equal_count": int(equal.sum()),
        "groups_equal_share": float(equal.mean()) if kept.size else None,
        "groups_dropped_count": int((~scores.valid).sum()),
        "images_count": scores.rewards.size,
        "images_not_finite_count": int((scores.faults > 0).sum()),
    }
    for name, values in scores.parts.items():
        # A part may be missing for some prompts, and then says nothing of them.
        present = values[np.isfinite(values) & scores.valid[:, None]]
        metrics[f"reward/{name}_mean"] = float(present.mean()) if present.size else None
    if len(rewards) > 1:
        for name in rewards:
            metrics |= _of_one(name, scores.parts[name][scores.valid].astype(np.float64))
    return metrics


def _of_one(name: str, scores: np.ndarray) -> Metrics:
    """Of one reward among several, (P, G): deviation of all its scores and within a group, and the share of the groups
    in which they are all equal."""
    asked = scores[np.isfinite(scores).all(axis=1)]
    if not asked.size:
        return {}
    found = {"std": asked.std(), "group_std": asked.std(axis=1).mean(), "equal_share": are_equal(asked).mean()}
    return {f"reward/{name}_{what}": float(value) for what, value in found.items()}


def are_equal(scores: np.ndarray) -> np.ndarray:
    """Of (P, G) scores of one reward, in which groups they differ by rounding alone: bool (P,).

    The bound is relative: it does not depend on the reward's scale.
    """
    equal: np.ndarray = np.ptp(scores, axis=1) <= EQUAL_TO * np.abs(scores).max(axis=1)
    return equal
