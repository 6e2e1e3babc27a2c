"""Means, intervals and which prompts are drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.evaluation.statistics import mean_with_ci95
from dgpo_fast.prompts import Prompt, in_turn


def test_interval_of_independent_images_by_hand() -> None:
    """One image a prompt: mean ± 1.96·s/√n with the sample's standard deviation."""
    rewards = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    mean, (low, high) = mean_with_ci95(rewards, list("abcde"))
    half = 1.959964 * rewards.std(ddof=1) / np.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))


def test_images_of_one_prompt_are_not_independent() -> None:
    """Twice the same images of each prompt say no more than once."""
    once = mean_with_ci95(np.array([0.0, 1.0, 0.5]), list("abc"))
    twice = mean_with_ci95(np.array([0.0, 1.0, 0.5] * 2), list("abc") * 2)
    assert once == twice


def test_interval_covers_the_truth_95_times_of_100() -> None:
    """Simulated: 40 prompts of differing difficulty, four images each."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        rewards = rng.normal(rng.normal(0.5, 0.2, (40, 1)), 0.3, (40, 4)).ravel()
        _, (low, high) = mean_with_ci95(rewards, [str(prompt) for prompt in range(40) for _ in range(4)])
        inside += low < 0.5 < high
    assert 0.93 < inside / 2000 < 0.965


def test_missing_rewards_do_not_count() -> None:
    assert mean_with_ci95(np.array([0.5, np.nan, 1.0]), list("abc"))[0] == 0.75
    assert np.isnan(mean_with_ci95(np.array([np.nan]), ["a"])[0])


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 60))
def test_tags_are_drawn_evenly(tags: list[str], images: int) -> None:
    prompts = [Prompt(f"{tag}{row}", {"tag": tag}) for row, tag in enumerate(tags)]
    counts = {tag: [p.tag for p in in_turn(prompts, lambda prompt: prompt.tag, images)].count(tag) for tag in set(tags)}
    assert sum(counts.values()) == images
    assert max(counts.values()) - min(counts.values()) <= 1


def test_evaluation_survives_its_file(tmp_path: Path) -> None:
    prompts = [Prompt("a cat", {"tag": "x", "include": [{"class": "cat"}]}), Prompt("ein Straßenschild „ß“")]
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    rewards = np.array([0.25, np.nan], np.float32)
    before = Evaluation(prompts, rewards, images, {"shapes/correct": rewards}, ["one failed"])
    before.save(tmp_path / "e.npz")
    after = Evaluation.load(tmp_path / "e.npz")
    assert after.prompts == prompts and (after.images == images).all()
    assert json.dumps(after.summary()) == json.dumps(before.summary())
    assert after.summary()["images"] == 1 and after.summary()["images_failed"] == 1
