"""Means, intervals and which prompts are drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.evaluation.statistics import geneval_scores, mean_with_ci95
from dgpo_fast.prompts import Prompt, in_turn
from dgpo_fast.run.console import Console


def test_interval_of_independent_images_by_hand() -> None:
    """One image a prompt: mean ± t·s/√n with the sample's standard deviation, t = 2.776 for 4 degrees of freedom."""
    rewards = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    mean, (low, high) = mean_with_ci95(rewards, list("abcde"))
    half = 2.776445 * rewards.std(ddof=1) / np.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))


def test_images_of_one_prompt_are_not_independent() -> None:
    """Twice the same images of each prompt say no more than once."""
    once = mean_with_ci95(np.array([0.0, 1.0, 0.5]), list("abc"))
    twice = mean_with_ci95(np.array([0.0, 1.0, 0.5] * 2), list("abc") * 2)
    assert once == twice


@pytest.mark.parametrize("prompts", [3, 40])
def test_interval_covers_the_truth_95_times_of_100(prompts: int) -> None:
    """Simulated: prompts of differing difficulty, four images each."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        rewards = rng.normal(rng.normal(0.5, 0.2, (prompts, 1)), 0.3, (prompts, 4)).ravel()
        _, (low, high) = mean_with_ci95(rewards, [str(prompt) for prompt in range(prompts) for _ in range(4)])
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
    before = Evaluation(prompts, rewards, images, {"shapes/correct": rewards}, ["one failed"], {"content of a:b": "c"})
    before.save(tmp_path / "e.npz")
    after = Evaluation.load(tmp_path / "e.npz")
    assert after.prompts == prompts and (after.images == images).all() and after.contents == before.contents
    assert json.dumps(after.summary()) == json.dumps(before.summary())
    assert after.summary()["images"] == 1 and after.summary()["images_failed"] == 1


def test_a_gain_is_of_pairs_by_hand() -> None:
    """Every picture minus the same one before: 0.1 and 0.3 of two prompts, where one picture was not scored twice."""
    prompts, images = [Prompt(text, {"tag": text[0]}) for text in ("a1", "a2", "b1", "b2")], np.zeros((4, 2, 2, 3))
    before, after = (
        Evaluation(prompts, np.array(rewards), images, {}, [])
        for rewards in ([0.2, 0.9, 0.5, np.nan], [0.3, 1.2, 0.7, 0.5])
    )
    gain = after.gain(before)
    assert gain is not None and (gain["prompts"], gain["images"]) == (3, 3)
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert [gain["reward_mean"], *gain["reward_ci95"]] == pytest.approx([0.2, 0.2 - half, 0.2 + half])
    assert [(tag, one["prompts"]) for tag, one in gain["tags"].items()] == [("a", 2), ("b", 1)]
    assert gain["tags"]["b"]["reward_mean"] == pytest.approx(0.2)
    others = Evaluation(prompts[:3], np.zeros(3), images[:3], {}, [])
    assert after.gain(others) is None, "of other prompts there are no pairs"


@pytest.mark.parametrize(("prompts", "shown"), [(4, False), (5, True)])
def test_the_table_that_ends_a_run(prompts: int, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Means, gain and their intervals in 80 columns; of fewer than five prompts, no interval."""
    texts = [Prompt(f"{n % prompts}", {"tag": "single_object" if n else "colors"}) for n in range(20)]
    rewards = np.linspace(0, 1, 20)
    before, after = (Evaluation(texts, one, np.zeros((20, 2, 2, 3)), {}, []) for one in (rewards / 2, rewards))
    Console().before_after(before.summary(), after.summary(), after.gain(before), "1 held-out prompt (of 8)")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= 80 and "…" not in line for line in lines)
    (row,) = (line.split() for line in lines if line.split()[:1] == ["all"])
    low, high = (after.gain(before) or {})["reward_ci95"]
    gain = ["+0.250", "±", f"{(high - low) / 2:.3f}"]
    assert row[-2:] == [str(prompts), "20"] and row.count("±") == 3 * shown
    assert row[-5:-2] == gain if shown else row[-3] == gain[0]


def test_one_prompt_has_no_interval() -> None:
    mean, interval = mean_with_ci95(np.array([0.25, 0.75]), ["a", "a"])
    assert mean == 0.5 and np.isnan(interval).all()


def test_geneval_by_hand() -> None:
    """Two tags of unequal size: 3 of 4 images and 1 of 2 are correct, so the score is 0.625 and not 4/6."""
    tags = ["counting"] * 4 + ["colors"] * 2
    prompts = [Prompt(text, {"tag": tag}) for text, tag in zip("aabbcd", tags, strict=True)]
    found = geneval_scores(np.array([1, 0, 1, 1, 0, 1.0]), prompts)
    assert found["overall_score"] == 0.625
    assert found["tags"] == {
        "counting": {"correct_images_share": 0.75, "images_count": 4},
        "colors": {"correct_images_share": 0.5, "images_count": 2},
    }
    assert found["correct_images_share"] == pytest.approx(4 / 6)
    assert found["correct_prompts_share"] == 0.75, "a, b and d have a correct image"
    # Prompts' sums of residuals: ±0.5 in counting (n = 4), ±0.5 in colors (n = 2); t is 12.7 for two prompts; each tag
    # weighs one half.
    half = 12.706205 * np.sqrt(2 * 0.5) / np.array([4, 2]) / 2
    assert found["overall_score_ci95"] == pytest.approx([0.625 - np.hypot(*half), 0.625 + np.hypot(*half)])


def test_geneval_leaves_out_what_could_not_be_judged() -> None:
    prompts = [Prompt(text, {"tag": text}) for text in "aab"]
    found = geneval_scores(np.array([1, np.nan, 0]), prompts)
    assert found["overall_score"] == 0.5 and found["correct_prompts_share"] == 0.5
    assert found["tags"]["a"]["images_count"] == 1
