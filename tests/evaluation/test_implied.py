"""How far implied rewards agree with people, by numbers done by hand."""

from pathlib import Path

import numpy as np
import pytest

from dgpo_fast.evaluation.implied import agreement, told
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.preferences import JudgedGroup, Kind


def group(prompt: str, kind: Kind, *scores: float) -> JudgedGroup:
    return JudgedGroup(Prompt(prompt), kind, tuple(Path(f"{n}.png") for n in range(len(scores))), scores)


def test_accuracy_counts_pairs_of_a_prompt_that_people_tell_apart() -> None:
    """Of the rated three, 2 of 3 pairs are right; the tied pair says nothing; one pair is right, one undecided."""
    groups = [
        group("a", "rating", 3, 1, 2),
        group("a", "pair", 1, -1),
        group("b", "pair", 1, -1),
        group("b", "rank", 0, 0),
    ]
    found = agreement(groups, np.array([0.3, 0.1, 0.4, 2.0, 1.0, 0.5, 0.5, 7.0, 8.0]))
    assert (found["pairs"], found["prompts"]) == (5, 2)
    assert found["accuracy"] == pytest.approx((2 + 1 + 0.5) / 5)
    assert "likes_auc" not in found
    assert found["accuracy_ci95"][0] < 0.7 < found["accuracy_ci95"][1]


def test_single_likes_are_compared_over_prompts() -> None:
    """Three liked and two disliked pictures, of which 4 of 6 pairs are right."""
    groups = [group("a", "like", 1), group("b", "like", 1, -1), group("c", "like", -1), group("d", "like", 1)]
    found = agreement(groups, np.array([0.9, 0.2, 0.1, 0.5, 0.4]))
    assert found["likes_auc"] == pytest.approx(4 / 6)
    assert (found["liked"], found["disliked"], found["accuracy"], found["pairs"]) == (3, 2, 1.0, 1)
    low, high = found["likes_auc_ci95"]
    assert low < 4 / 6 < high and (low + high) / 2 == pytest.approx(4 / 6)
    assert " 100.0 % of 1 pairs of 1 prompts and 66.7 % (" in told(found)


def test_before_training_all_is_chance_and_nothing_held_out_is_nothing() -> None:
    assert agreement([group("a", "pair", 1, -1), group("b", "pair", 1, -1)], np.zeros(4))["accuracy"] == 0.5
    assert agreement([group("a", "like", 1)], np.zeros(1)) == {}
