"""The distance from the base model's velocities, and the norm hinge in every objective."""

import math
from pathlib import Path

import pytest
import torch

from dgpo_fast.config.objective_options import Regulariser
from dgpo_fast.objectives.drift import DRIFT, LEVELS, as_numbers, drift_sums, norm_hinge, norm_ratio, with_drift
from tests.denoising_case import config_of
from tests.objective_case import Case, make_config
from tests.objective_configs import grpo_case

BASE = torch.randn(5, 2, 3, 3, generator=torch.manual_seed(0), dtype=torch.float64)


def test_the_hinge_is_zero_below_the_bases_norm_with_its_gradient() -> None:
    policy_v = (0.9 * BASE).requires_grad_()
    norm_hinge(policy_v, BASE).sum().backward()
    assert (norm_hinge(policy_v, BASE) == 0).all() and (policy_v.grad == 0).all()


def test_the_hinge_is_the_square_of_what_the_norm_has_grown() -> None:
    """v = (1 + a)·v_base: a². Turned at the same norm it is the same, and its gradient is along v."""
    turned = BASE.flip(1).contiguous().requires_grad_()
    for a in (0.05, 0.3):
        assert norm_hinge((1 + a) * BASE, BASE).tolist() == pytest.approx([a**2] * 5)
        assert norm_hinge((1 + a) * turned, BASE).tolist() == pytest.approx([a**2] * 5)
    norm_hinge(1.3 * turned, BASE).sum().backward()
    cosine = torch.cosine_similarity(turned.grad.flatten(1), turned.detach().flatten(1))
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))


def test_the_hinge_has_no_kink_at_the_bases_norm() -> None:
    for factor in (1 - 1e-6, 1.0, 1 + 1e-6):
        policy_v = (factor * BASE).requires_grad_()
        norm_hinge(policy_v, BASE).sum().backward()
        assert policy_v.grad.norm() < 1e-5


def test_means_for_each_part_of_sigma_by_hand() -> None:
    """Two samples below σ = ¼, one at σ = 1, one of padding; sums of two batches add up."""
    base, sigma = torch.ones(4, 1, 2, 2), torch.tensor([0.1, 0.2, 1.0, 0.6])
    policy = base * torch.tensor([1.0, 1.2, 2.0, 9.0])[:, None, None, None]
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sums = sum(
        drift_sums(policy[rows], base[rows], base[rows], sigma[rows], weight[rows])
        for rows in (slice(0, 1), slice(1, 4))
    )
    found = with_drift({"loss": 2.0} | as_numbers({"drift": 0.25 * sums}))
    assert found == {
        "loss": 2.0,
        "norm_ratio": pytest.approx(1.4),
        "base_distance": pytest.approx((0.04 + 1) / 3),
        "norm_ratio/sigma_0_0.25": pytest.approx(1.1),
        "base_distance/sigma_0_0.25": pytest.approx(0.02),
        "norm_ratio/sigma_0.75_1": pytest.approx(2.0),
        "base_distance/sigma_0.75_1": pytest.approx(1.0),
    }
    assert norm_ratio(policy, base).tolist() == pytest.approx([1.0, 1.2, 2.0, 9.0])


def case_of(name: str, folder: Path, norm_hinge: float, **settings: object) -> Case:
    """An iteration of an objective, with the hinge."""
    if name == "flow_grpo":
        case = grpo_case(folder, kl_weight=settings.get("kl_weight", 0.0))
    else:
        case = Case(folder, make_config(**settings) if name == "dgpo" else config_of(name, **settings))
    case.config.regulariser.norm_hinge = norm_hinge
    return case


OBJECTIVES = {
    "dgpo": {"kl_weight": 0.0},
    "nft": {"kl_weight": 0.0},
    "awm": {"kl_weight": 0.0, "ema_weight": 0.0},
    "ram": {},
    "crd": {"kl_weight": 0.0, "kl_weight_worst": 0.0, "kl_guidance_scale": 1.0},
    "flow_grpo": {},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_adds_the_hinge_exactly_for_any_micro_batch(name: str, random_pipeline: Path) -> None:
    """The gradient grows by the weight times the hinge's, whatever the micro-batch, and the loss by its value."""
    found = {
        (weight, micro): case_of(name, random_pipeline, weight, **OBJECTIVES[name]).gradient(micro)
        for weight, micro in ((0.0, 12), (50.0, 12), (100.0, 12), (100.0, 5))
    }
    none, half, whole, small = (gradient for gradient, _ in found.values())
    assert ((whole - half) - (half - none)).norm() < 1e-2 * (half - none).norm() > 0
    assert (whole - small).norm() < 1e-4 * whole.norm()
    metrics = {key: with_drift(as_numbers(values)) for key, (_, values) in found.items()}
    hinge = metrics[100.0, 12]["norm_hinge"]
    assert metrics[100.0, 12]["loss"] - metrics[0.0, 12]["loss"] == pytest.approx(
        100 * hinge, rel=1e-2, abs=1e-5 * abs(metrics[0.0, 12]["loss"])
    )
    for key in ("norm_ratio", "base_distance", "norm_hinge"):
        assert metrics[100.0, 12][key] == pytest.approx(metrics[100.0, 5][key], rel=1e-4)
    assert metrics[100.0, 12]["base_distance"] > 0 and math.isfinite(hinge) and hinge > 0


def test_the_distance_is_from_the_base_and_the_norm_over_what_the_kl_term_holds_to(random_pipeline: Path) -> None:
    """Whichever reference DGPO's score has: the distance is from the base without guidance, and the norm is compared
    with the guided one if the KL term distils guidance."""
    guided = {"kl_guidance_scale": 2.0, "kl_weight": 0.1}
    variants = [{"kl_weight": 0.1}, guided, {**guided, "guided_reference": True}, {**guided, "reference": "ema"}]
    found = [Case(random_pipeline, make_config(**variant)).gradient(12)[1] for variant in variants]
    sums = [[value for name, value in metrics.items() if name.startswith(f"{DRIFT}/")] for metrics in found]
    plain, *others = (torch.tensor(one).reshape(LEVELS, 3) for one in sums)
    for drift in others:
        torch.testing.assert_close(drift[:, [0, 2]], plain[:, [0, 2]])
        torch.testing.assert_close(drift[:, 1], others[0][:, 1])
        assert (drift[:, 1] - plain[:, 1]).abs().max() > 1e-3


def test_the_default_has_no_hinge() -> None:
    assert make_config().regulariser == Regulariser(norm_hinge=0.0)
