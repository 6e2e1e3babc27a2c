"""Training on part of each group: which images are kept, with which advantages, and what that saves."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.config.command_line import configure
from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.distributed import BatchPart
from dgpo_fast.errors import UserError
from dgpo_fast.objectives.kept import drawn, extremes, kept
from tests.objective_case import GROUPS, SIZE, Case, make_config
from tests.objective_configs import assert_same, make_batch, watched

HALF = SIZE // 2


def test_extremes_by_hand() -> None:
    """The best and the worst, centred again; of equal ones any, and a group that prefers nothing still does."""
    places, advantage = extremes(np.array([[4.0, 0.0, -1.0, -3.0], [0.0] * 4]), 2)
    assert places[0].tolist() == [0, 3] and advantage.tolist() == [[3.5, -3.5], [0.0, 0.0]]
    places, advantage = extremes(np.array([[-1.0, 2.0, 5.0, -4.0, -3.0, 1.0]]), 4)
    assert places.tolist() == [[1, 2, 3, 4]] and advantage.tolist() == [[2.0, 5.0, -4.0, -3.0]]


def test_a_draw_by_hand() -> None:
    """Better: pieces of 3 and 1, hit at 1/8 and 5/8 of 4, both times the first. Worse: 2 and 2, one each. Each has the
    mean of the |A| of its side, 1, with its sign."""
    group = np.array([[3.0, -2.0, 1.0, -2.0]])
    places, advantage = drawn(group, 4, np.array([[0.25], [0.25]]))
    assert places.tolist() == [[0, 0, 1, 3]] and advantage.tolist() == [[2.0, 2.0, -2.0, -2.0]]
    places, advantage = drawn(np.zeros((1, 4)), 2, np.array([[0.25], [0.25]]))
    assert places.tolist() == [[0, 1]] and advantage.tolist() == [[0.0, 0.0]]


def shifts(side: np.ndarray, half: int) -> Iterator[tuple[float, float]]:
    """(a shift, its probability) of each interval of [0, 1) in which the same images are hit."""
    turns = {0.0, 1.0, *(side.cumsum() / side.sum() * half % 1.0).tolist()}
    for start, stop in pairwise(sorted(turns)):
        yield (start + stop) / 2, stop - start


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=7), st.integers(1, 3), st.integers(0, 99))
def test_a_draw_is_right_on_average(numbers: list[int], half: int, seed: int) -> None:
    """Over all shifts, exactly: the mean over the kept of A'·f is that over the group of A·f, for any f; how often an
    image is kept is proportional to |A|. In each draw A' sums to 0, and positions never fall."""
    group = np.array(numbers) - np.mean(numbers)
    f = np.random.default_rng(seed).normal(size=len(group))
    if not group.any():
        return
    sides = group.clip(min=0), -group.clip(max=0)
    expected, often = 0.0, np.zeros(len(group))
    for (better, p), (worse, q) in product(shifts(sides[0], half), shifts(sides[1], half)):
        places, advantage = drawn(group[None], 2 * half, np.array([[better], [worse]]))
        assert places.shape == advantage.shape == (1, 2 * half) and (np.diff(places[0]) >= 0).all()
        assert abs(advantage.sum()) < 1e-12 * np.abs(advantage).sum()
        expected += p * q * (advantage[0] * f[places[0]]).mean()
        often += p * q * np.bincount(places[0], minlength=len(group))
    assert expected == pytest.approx((group * f).mean(), rel=1e-11, abs=1e-13)
    np.testing.assert_allclose(often, half * np.abs(group) / sides[0].sum(), atol=1e-12)


@pytest.mark.parametrize("by", ["extremes", "draw"])
def test_all_images_are_the_batch_itself(by: str) -> None:
    batch = make_batch(np.array([[1.0, 0.0, -1.0]]))
    for keep in (None, 3):
        assert kept(batch, Advantage(keep=keep, keep_by=by), 0) is batch


def test_a_draw_is_its_seeds_and_iterations() -> None:
    rng = np.random.default_rng(0)
    advantage = rng.normal(size=(8, 8))
    batch = make_batch((advantage - advantage.mean(1, keepdims=True)).astype(np.float32))
    config = Advantage(keep=4, keep_by="draw")

    def places(seed: int, iteration: int) -> list[int]:
        return kept(replace(batch, iteration=iteration), config, seed).sample_index.tolist()

    assert places(0, 5) == places(0, 5) != places(0, 6) != places(1, 6)


@pytest.mark.parametrize("by", ["extremes", "draw"])
def test_groups_still_cancel_and_forwards_are_saved(by: str, random_pipeline: Path) -> None:
    """DGPO on half of each group: half of the rows of base and policy; the advantages of a group sum to 0."""
    case = Case(random_pipeline, make_config(clip_range=None))
    whole = watched(case)[2]
    case.batch = kept(case.batch, Advantage(keep=HALF, keep_by=by), 0)
    assert case.batch.group_size == HALF and case.batch.groups == GROUPS
    assert case.batch.advantage.reshape(GROUPS, HALF).sum(1).abs().max() < 1e-6
    assert case.batch.group_index.tolist() == np.repeat(range(GROUPS), HALF).tolist()
    half = watched(case)[2]
    assert {name: 2 * sum(rows) for name, rows in half.items()} == {name: sum(rows) for name, rows in whole.items()}
    assert sum(half["base"]) == sum(half["policy"]) == 3 * GROUPS * HALF


@pytest.mark.parametrize("by", ["extremes", "draw"])
@pytest.mark.parametrize("padded", [False, True])
def test_processes_keep_what_one_keeps(by: str, padded: bool, random_pipeline: Path) -> None:
    """Two groups, and one; with sharded weights, the processes' batches are equally long."""
    case, config = Case(random_pipeline, make_config()), Advantage(keep=HALF, keep_by=by)
    whole, edges = case.batch, (0, 2 * SIZE, 3 * SIZE)
    case.batch = kept(whole, config, 0)
    expected, images = case.gradient(12), case.batch.sample_index.tolist()
    found, metrics, held, lengths = torch.zeros(()), {}, [], []  # type: ignore[var-annotated]
    for first, stop in pairwise(edges):
        part = BatchPart(first, GROUPS, SIZE, whole.advantage, edges=edges if padded else None)
        case.batch = kept(whole.taken(torch.arange(first, stop), part), config, 0)
        held += case.batch.sample_index[: case.batch.own].tolist()
        lengths.append(len(case.batch.x0))
        mine = case.gradient(12)
        found = found + mine[0]
        for name, value in mine[1].items():
            metrics[name] = metrics.get(name, 0.0) + value
    assert held == images and lengths == ([4, 4] if padded else [4, 2])
    assert_same((found, metrics), expected)


WRONG = {
    "tiny-shapes --advantage.keep 18": "advantage.keep is 18 but a group has 16 images (rollout.group_size): lower it "
    "or raise that",
    "tiny-shapes --advantage.keep 5": "advantage.keep is 5 but half of the kept images are better ones and half worse: "
    "use an even number",
    "tiny-shapes-diffusion-dpo --advantage.keep 4": "advantage.keep is 4 but objective diffusion_dpo always trains on "
    "the best and the worst image of a group: leave it out",
    "tiny-shapes --advantage.keep 0": "advantage.keep: input should be greater than or equal to 1, not '0'",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_kept_is_refused_in_one_line(line: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(line.split())
    assert str(caught.value) == f"command line: {WRONG[line]}"
