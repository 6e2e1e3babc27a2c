"""Scores of shares: each process scores the images that it drew, and all of them get all scores.

Images stay where they were drawn. Shares have equal numbers of images of one size. If prompts have their own rewards,
each share has its part of each kind (`prompts.dealing.spread`), so all processes have the same work and moving pixels
would gain nothing. The metrics have the time that each process took.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dgpo_fast.distributed.placement import Share
from dgpo_fast.distributed.processes import Processes
from dgpo_fast.prompts.prompt import Prompt
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards.weighted import GroupScores, picture_failures


def gather_scores(
    mine: GroupScores, share: Share, prompts: Sequence[Prompt], processes: Processes, what: str
) -> GroupScores:
    """The scores of all P groups on every process. A group is valid if all of its pieces are.

    Args:
        mine: scores of the share's pieces, each as a group of its own.
        share: which samples they are.
        prompts: P, of all groups. Pictures that are not finite are named by them.
        processes: all of them call this together.
        what: named in the error if the others do not come.
    """
    scores = mine if processes.count == 1 else _gathered(mine, share, len(prompts), processes, what)
    return replace(scores, failures=[*picture_failures(scores.faults, prompts), *scores.failures])


def _gathered(mine: GroupScores, share: Share, groups: int, processes: Processes, what: str) -> GroupScores:
    everyone = processes.gather(_plain(mine, share), what)
    samples = groups * share.group_size
    names = dict.fromkeys(name for theirs in everyone for name in theirs["parts"])
    rewards = np.full(samples, np.nan, np.float32)
    parts = {name: np.full(samples, np.nan, np.float32) for name in names}
    scored, faults = np.zeros(samples, bool), np.zeros(samples, np.uint8)
    for theirs in everyone:
        rows = slice(theirs["start"], theirs["stop"])
        rewards[rows], scored[rows], faults[rows] = theirs["rewards"], theirs["valid"], theirs["faults"]
        for name, values in theirs["parts"].items():
            parts[name][rows] = values
    shape = (groups, share.group_size)
    valid: np.ndarray = np.logical_and.reduce(scored.reshape(shape), axis=1)
    return GroupScores(
        rewards=np.where(valid[:, None], rewards.reshape(shape), np.float32(np.nan)),
        parts={name: values.reshape(shape) for name, values in parts.items()},
        valid=valid,
        failures=[line for theirs in everyone for line in theirs["failures"]],
        faults=faults.reshape(shape),
    )


def _plain(scores: GroupScores, share: Share) -> JsonObject:
    """One share's scores as JSON values."""
    return {
        "start": share.start,
        "stop": share.stop,
        "rewards": scores.rewards.flatten().tolist(),
        "valid": np.repeat(scores.valid, scores.rewards.shape[1]).tolist(),
        "parts": {name: values.flatten().tolist() for name, values in scores.parts.items()},
        "failures": scores.failures,
        "faults": scores.faults.flatten().tolist(),
    }
