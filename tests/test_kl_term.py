"""KL terms whose weight grows with the distance from the base, or depends on what other rewards say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_fast.objectives.kl_term import gates, ranks, weighed
from dgpo_fast.rewards import GroupScores
from tests.denoising_case import config_of
from tests.objective_case import GROUPS, SIZE, Case, make_config
from tests.objective_configs import grpo_case

KL = torch.tensor([0.0, 0.01, 0.05, 2.0], dtype=torch.float64)


def scores(trained: np.ndarray, others: dict[str, np.ndarray], valid: list[bool] | None = None) -> GroupScores:
    """Groups whose rewards are `trained` (P, G), beside those of other rewards."""
    rewards = np.asarray(trained, np.float32)
    parts = {name: np.asarray(values, np.float32) for name, values in others.items()}
    faults = np.zeros(rewards.shape, np.uint8)
    return GroupScores(rewards, parts, np.array(valid or [True] * len(rewards)), [], faults)


def gate(trained: object, **others: object) -> list[list[float]]:
    """The gates of groups, of which all could be scored."""
    found = scores(np.array(trained), {name: np.array(values) for name, values in others.items()})
    gate = gates(found, torch.from_numpy(found.rewards).flatten(), list(others))
    assert gate is not None and gate.dtype == torch.float32
    return gate.tolist()


def slope(growth: float, kl: torch.Tensor = KL) -> torch.Tensor:
    """The weight that a KL term of weight 3 has at each distance: its derivative by the KL."""
    kl = kl.clone().requires_grad_()
    return torch.autograd.grad(weighed(kl, 3.0, growth).sum(), kl)[0]


def test_the_weight_grows_in_a_straight_line_from_the_plain_one() -> None:
    """3·(1 + growth·KL), by the derivative: 3 at the base, twice that at 1/growth, and continuous in between."""
    assert slope(20.0).tolist() == pytest.approx([3.0, 3.6, 6.0, 123.0])
    fine = slope(20.0, torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert fine.diff().min() > 0 and fine.diff().max() < 0.1


def test_no_growth_and_no_gate_is_the_plain_term_to_the_last_bit() -> None:
    assert torch.equal(weighed(KL, 0.3), 0.3 * KL) and (slope(0.0) == 3.0).all()
    assert torch.equal(weighed(KL, 0.3, 7.0, torch.ones(4)), weighed(KL, 0.3, 7.0))
    assert (weighed(KL, 0.3, 7.0, torch.zeros(4)) == 0).all()


def test_two_images_on_which_rewards_disagree() -> None:
    """Held is the one that training prefers and the other reward does not: not the other way round."""
    assert gate([[1, 0]], other=[[0, 1]]) == [[1, 0]]


def test_rewards_that_agree_hold_nothing() -> None:
    """Whatever their scales: only the order counts."""
    assert gate([[3, 1, 2]], other=[[0.3, 0.1, 0.299]], third=[[9e4, -7, 0]]) == [[0, 0, 0]]


def test_the_mean_of_two_opinions_by_hand() -> None:
    """Ranks of the trained reward: 1, ½, 0; of one opinion 0, ½, 1 and of the other 0, 1, ½."""
    assert gate([[3, 2, 1]], a=[[1, 2, 3]], b=[[0, 9, 5]]) == [[1, 0, 0]]
    assert gate([[3, 2, 1]], a=[[1, 2, 3]], b=[[3, 2, 1]]) == [[0.5, 0, 0]]


def test_a_reward_that_says_nothing_confirms_nothing() -> None:
    """Equal scores rank all images ½, to within rounding, and so do scores that are missing (NaN)."""
    for silent in ([5.0, 5.0, 5.0], [1 + 1e-6, 1.0, 1 - 1e-6], [np.nan] * 3):
        assert gate([[3, 2, 1]], other=[silent]) == [[0.5, 0, 0]]
    found = scores(np.array([[3, 2, 1]]), {})
    assert gates(found, torch.tensor([3.0, 2.0, 1.0]), ["unasked"]).tolist() == [[0.5, 0, 0]]
    assert gates(found, torch.tensor([3.0, 2.0, 1.0]), []) is None


def test_the_scale_of_a_reward_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    trained, other = rng.normal(size=(2, 4, 9))
    assert gate(1000 * trained, other=other) == gate(trained, other=1e-3 * other) == gate(trained, other=other)
    assert gate(trained, other=other) != gate(trained, other=-other)


def test_groups_that_could_not_be_scored_are_not_held() -> None:
    """Their place in (P, G) stays, and the advantages are those of the others."""
    found = scores(np.array([[np.nan] * 2, [1, 0]]), {"other": np.array([[np.nan] * 2, [0, 1]])}, [False, True])
    assert gates(found, torch.tensor([1.0, -1.0]), ["other"]).tolist() == [[0, 0], [1, 0]]


def test_ranks_are_shares_of_the_others() -> None:
    """Mean ½ in each group; ties share theirs."""
    assert ranks(np.array([[1.0, 2.0, 2.0, 4.0]])).tolist() == [pytest.approx([0, 0.5, 0.5, 1])]


CASES: dict[str, Callable[[Path, float], Case]] = {
    "dgpo": lambda folder, weight: Case(folder, make_config(kl_weight=weight)),
    "nft": lambda folder, weight: Case(folder, config_of("nft", kl_weight=weight)),
    "awm": lambda folder, weight: Case(folder, config_of("awm", kl_weight=weight, ema_weight=0.0)),
    "crd": lambda folder, weight: Case(folder, config_of("crd", kl_weight=weight, kl_weight_worst=weight)),
    "flow_grpo": lambda folder, weight: grpo_case(folder, kl_weight=weight),
}
HALF = GROUPS * SIZE // 2


@pytest.mark.parametrize("name", CASES)
def test_every_objective_weighs_each_sample(name: str, random_pipeline: Path) -> None:
    """Two gates that add up to 1 have gradients and losses that add up to the plain term's; the growth adds in
    proportion. For any micro-batch."""

    def found(weight: float, gate: torch.Tensor | None = None, growth: float = 0.0, micro: int = 12) -> tuple:
        case = CASES[name](random_pipeline, weight)
        case.config.regulariser.kl_growth = growth
        case.batch = replace(case.batch, kl_gate=gate)
        gradient, metrics = case.gradient(micro)
        return gradient.double(), metrics

    first = (torch.arange(GROUPS * SIZE) < HALF).float()
    nothing, plain = found(0.0), found(4.0)
    one, other = found(4.0, first), found(4.0, 1 - first)
    term = plain[0] - nothing[0]
    assert term.norm() > 0 and 0.1 < (one[0] - nothing[0]).norm() / term.norm() < 10
    assert (one[0] + other[0] - nothing[0] - plain[0]).norm() < 1e-3 * term.norm()
    assert one[1]["loss"] + other[1]["loss"] == pytest.approx(nothing[1]["loss"] + plain[1]["loss"], rel=1e-4, abs=1e-6)
    assert one[1]["kl"] == pytest.approx(plain[1]["kl"], rel=1e-4), "the metric is not weighed"
    some, more, small = found(4.0, first, 10.0), found(4.0, first, 20.0), found(4.0, first, 20.0, micro=5)
    grown = some[0] - one[0]
    assert grown.norm() > 0 and (more[0] - some[0] - grown).norm() < 1e-2 * grown.norm()
    assert more[1]["loss"] - some[1]["loss"] == pytest.approx(some[1]["loss"] - one[1]["loss"], rel=1e-2, abs=1e-6)
    assert (more[0] - small[0]).norm() < 1e-4 * more[0].norm()
