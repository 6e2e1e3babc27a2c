"""Draws are functions of counters, and advantages are what they should be."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.distributed import place
from dgpo_fast.objectives.advantages import advantages, advantages_of_each
from dgpo_fast.objectives.levels import draw_training_steps
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.dealing import GroupSampler, spread
from dgpo_fast.seeds import stream_seed

REWARDS = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 9)), elements=st.floats(-10, 10, width=32))


@settings(deadline=None)
@given(REWARDS, st.sampled_from(["group", "global"]))
def test_advantages_of_a_group_cancel(rewards: np.ndarray, std: str) -> None:
    """Σ A = 0 in a group, so that the partition function cancels; a better image has no smaller advantage."""
    found = advantages(rewards, Advantage(std=std, clamp=1e9)).reshape(rewards.shape)
    assert torch.allclose(found.double().sum(1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-4)
    for group, scores in zip(rewards, found, strict=True):
        assert (np.diff(scores.numpy()[np.argsort(group, kind="stable")]) >= 0).all()


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_all_drawn_are_the_prompts_of_all_iterations(prompts: int, groups: int, first: int, count: int) -> None:
    sampler = GroupSampler([Prompt(str(number)) for number in range(prompts)], groups, seed=0)
    expected = [prompt.text for iteration in range(first, first + count) for prompt in sampler.draw(iteration)]
    found = [prompt.text for prompt in sampler.all_drawn(range(first, first + count))]
    assert list(dict.fromkeys(found)) == list(dict.fromkeys(expected))


@settings(deadline=None)
@example(kinds=list("ddabcddddd"), processes=3)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(1, 40))
def test_every_process_gets_its_part_of_each_kind(kinds: list[str], processes: int) -> None:
    """Shares of an iteration hold each kind in proportion, within two groups; one kind alone stays as it is."""
    found = spread(list(enumerate(kinds)), lambda item: item[1])
    assert sorted(found) == list(enumerate(kinds))
    assert len(set(kinds)) > 1 or found == list(enumerate(kinds))
    for share in place(len(kinds), 1, min(processes, len(kinds))):
        mine = [kind for _, kind in found[share.start : share.stop]]
        for kind in kinds:
            assert abs(mine.count(kind) - kinds.count(kind) * len(share) / len(kinds)) < 2


@settings(deadline=None)
@given(st.floats(-100, 100, width=32), st.integers(2, 30))
def test_equal_rewards_give_exact_zeros(reward: float, size: int) -> None:
    rewards = np.full((2, size), reward, np.float32)
    rewards[1, 0] += 1
    assert (advantages(rewards, Advantage(std="group")).reshape(2, size)[0] == 0).all()


def test_advantages_by_hand() -> None:
    """Group (0, 1): mean ½, std ½. Group (2, 2, …) scaled by the std of all four rewards of the iteration."""
    rewards = np.array([[0.0, 1.0], [0.0, 4.0]], np.float32)
    by_group = advantages(rewards, Advantage(std="group")).tolist()
    assert by_group == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001, -2 / 2.0001, 2 / 2.0001])
    std = np.sqrt(np.mean((np.array([0, 1, 0, 4]) - 1.25) ** 2)) + 1e-4
    by_all = advantages(rewards, Advantage(std="global")).tolist()
    assert by_all == pytest.approx([-0.5 / std, 0.5 / std, -2 / std, 2 / std])
    assert advantages(np.array([[0.0] * 99 + [1.0]], np.float32), Advantage(clamp=5.0)).max() == 5.0


@settings(deadline=None)
@given(REWARDS, REWARDS, st.sampled_from(["group", "global"]), st.floats(0.5, 5))
def test_advantages_of_several_rewards_cancel(first: np.ndarray, second: np.ndarray, std: str, clamp: float) -> None:
    """Σ A = 0 in every group, clamped or not, and no advantage is above the clamp."""
    shape = np.minimum(first.shape, second.shape)
    rewards = {name: one[: shape[0], : shape[1]] for name, one in (("a", first), ("b", second))}
    found = advantages_of_each(rewards, {"a": 1.0, "b": -0.5}, Advantage(of="each", std=std, clamp=clamp))
    found = found.double().reshape(*shape)
    assert torch.allclose(found.sum(1), torch.zeros(shape[0], dtype=torch.float64), atol=1e-4)
    assert found.abs().max() <= clamp * (1 + 1e-6)


def each(weights: dict[str, float], **rewards: np.ndarray) -> np.ndarray:
    return advantages_of_each(rewards, weights, Advantage(of="each")).numpy().reshape(rewards["a"].shape)


def test_advantages_of_each_reward() -> None:
    """One reward alone is its group's z-score; its scale and a reward of weight 0 change nothing."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    alone = each({"a": 1.0}, a=a)
    np.testing.assert_allclose(alone, (a - a.mean(1, keepdims=True)) / a.std(1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(each({"a": 1.0, "b": 0.0}, a=a, b=b), alone, rtol=1e-6)
    both = each({"a": 1.0, "b": 1.0}, a=a, b=b)
    np.testing.assert_allclose(each({"a": 1.0, "b": 1.0}, a=100 * a, b=b), both, rtol=1e-4, atol=1e-6)
    assert np.abs(both - alone).max() > 0.1 and both.std() == pytest.approx(1)


def test_a_reward_that_is_equal_in_a_group_adds_nothing_there() -> None:
    """Also if rounding makes its scores differ; nor does one that the group's prompt did not ask for."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 6)).astype(np.float32) for _ in range(2))
    for silent in (0.1, 0.1 + 1e-8 * np.arange(6), np.nan):
        b[0] = silent
        both = each({"a": 1.0, "b": 1.0}, a=a, b=b)
        alone = a[0] - a[0].mean()
        assert np.corrcoef(both[0], alone)[0, 1] == pytest.approx(1)
        assert np.corrcoef(both[1], a[1] - a[1].mean())[0, 1] < 0.99
    assert (each({"a": 1.0}, a=np.full((2, 3), 0.1, np.float32)) == 0).all()


def test_prompts_are_dealt_once_a_pass_and_depend_on_the_iteration_alone() -> None:
    prompts = [Prompt(str(number)) for number in range(10)]
    dealt = [p.text for iteration in range(5) for p in GroupSampler(prompts, 4, seed=3).draw(iteration)]
    assert sorted(dealt[:10]) == sorted(dealt[10:]) == sorted(p.text for p in prompts)
    assert dealt[:10] != dealt[10:]
    sampler = GroupSampler(prompts, 4, seed=3)
    assert [p.text for p in sampler.draw(4)] == dealt[16:]
    assert [p.text for p in GroupSampler(prompts, 4, seed=4).draw(0)] != dealt[:4]
    assert len(GroupSampler(prompts[:2], 7, seed=0).draw(1)) == 7


def test_training_steps_are_the_noisiest_without_repetition() -> None:
    draws = [draw_training_steps(i, count=4, among=5, seed=0) for i in range(200)]
    assert all(len(set(draw)) == 4 and set(draw) <= set(range(5)) for draw in draws)
    counts = np.bincount(np.ravel(draws), minlength=5)
    assert counts.min() > 120, "each of the five steps is used in about 160 of 200 iterations"
    assert draws[7] == draw_training_steps(7, count=4, among=5, seed=0)


def test_streams_differ() -> None:
    seeds = {stream_seed(seed, stream) for seed in range(50) for stream in ("prompts", "timesteps", "initial noise")}
    assert len(seeds) == 150 and all(0 <= seed < 2**63 for seed in seeds)
