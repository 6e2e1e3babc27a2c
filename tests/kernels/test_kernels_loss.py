"""The DGPO loss: a group worked by hand, derivatives, clipping, split groups, and its use under torch.compile."""

import math

import pytest
import torch
from dgpo_kernels import DGPOLoss, dgpo_loss, philox_normal

SEED, DRAW = 23, 4


def from_losses(dsm: dict[str, list[float]], groups: list[int], elements: int = 1) -> tuple[dict, torch.Tensor]:
    """Predictions (B, elements) with the given denoising losses: v = v* + sqrt(d), each element alike; and x0 = 0."""
    index = torch.tensor(groups)
    target = philox_normal((elements,), index, seed=SEED, draw=DRAW, dtype=torch.float64)
    predictions = {
        name: target + torch.tensor(values, dtype=torch.float64).sqrt()[:, None] for name, values in dsm.items()
    }
    return predictions | {"x0": torch.zeros_like(target)}, index


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_two_groups_worked_by_hand():
    """β = 2, groups a = {0, 2} and b = {1, 3, 4}, every number below computed on paper.

    s_a = 2/2·(1·(0.49 − 0.36) + (−1)·(1.00 − 0.81)) = 0.13 − 0.19 = −0.06
    s_b = 2/3·(2·(0.25 − 0.49) + (−0.5)·(0.64 − 0.36) + (−1.5)·(0.16 − 0.04)) = 2/3·(−0.48 − 0.14 − 0.18) = −8/15
    loss = 1/2·(ln(1 + e^−0.06) + ln(1 + e^(−8/15)))/2 + 0.1·1/5·(kl of 0.01 each, five samples)
    """
    predictions, index = from_losses(
        {
            "policy_v": [0.49, 0.25, 1.00, 0.64, 0.16],
            "ref_v": [0.36, 0.49, 0.81, 0.36, 0.04],
            # Differences d_old − d_policy: 0.15 (A > 0, above ln 1.1), 0.05 (inside), −0.15 (A < 0, below ln 0.9),
            # 0.17 (A < 0, the harmless side), −0.12 (A < 0, below).
            "old_v": [0.64, 0.30, 0.85, 0.81, 0.04],
        },
        groups=[9, -4, 9, -4, -4],
    )
    advantage = torch.tensor([1.0, 2.0, -1.0, -0.5, -1.5], dtype=torch.float64)
    policy = predictions.pop("policy_v").requires_grad_()
    result = dgpo_loss(
        policy,
        **predictions,
        advantage=advantage,
        group_index=index,
        seed=SEED,
        draw=DRAW,
        beta=2.0,
        clip_range=0.1,
        kl_v=policy.detach() - 0.1,
        kl_weight=0.1,
    )
    s_a, s_b = -0.06, -8 / 15
    close = {"atol": 1e-12, "rtol": 0}

    def expect(*values):
        return torch.tensor(values, dtype=torch.float64)

    torch.testing.assert_close(result.group_score, expect(s_a, s_b, s_a, s_b, s_b), **close)
    torch.testing.assert_close(result.dsm_policy, expect(0.49, 0.25, 1.00, 0.64, 0.16), **close)
    torch.testing.assert_close(result.dsm_ref, expect(0.36, 0.49, 0.81, 0.36, 0.04), **close)
    torch.testing.assert_close(result.dsm_old, expect(0.64, 0.30, 0.85, 0.81, 0.04), **close)
    torch.testing.assert_close(result.kl, expect(*[0.01] * 5), **close)
    assert result.clipped.tolist() == [True, False, True, False, True]
    value = 0.5 * (math.log1p(math.exp(s_a)) + math.log1p(math.exp(s_b))) / 2 + 0.1 * 0.01
    assert math.isclose(result.loss.item(), value, abs_tol=1e-12)
    assert math.isclose(value, 0.282305, abs_tol=1e-6)
    # ∂/∂policy_v = σ(s)·A/(P·G)·2·sqrt(d) where not clipped, + 0.1/5·2·0.1.
    assert math.isclose(sigmoid(s_b), 0.369740, abs_tol=1e-6)
    (gradient,) = torch.autograd.grad(result.loss, policy)
    weights = [0.0, sigmoid(s_b) * 2 / 6, 0.0, sigmoid(s_b) * -0.5 / 6, 0.0]
    roots = [0.7, 0.5, 1.0, 0.8, 0.4]
    by_hand = [w * 2 * root + 0.004 for w, root in zip(weights, roots, strict=True)]
    torch.testing.assert_close(gradient[:, 0], expect(*by_hand), **close)


def random_case(batch: int = 7, shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(1)
    policy, *others = torch.randn(5, batch, *shape, dtype=dtype, generator=generator)
    near = [policy + 0.3 * other for other in others[:3]]
    return {
        "policy_v": policy.requires_grad_(),
        "x0": others[3],
        **dict(zip(("ref_v", "old_v", "kl_v"), near, strict=True)),
        "advantage": torch.randn(batch, dtype=dtype, generator=generator),
        "group_index": torch.tensor([4, 4, 9, 4, 9, -1, 2**50][:batch]),
        "seed": SEED,
        "draw": DRAW,
        "beta": 3.0,
        "kl_weight": 0.2,
    }


def gradient_of(case: dict, **options) -> torch.Tensor:
    result = dgpo_loss(**(case | options))
    return torch.autograd.grad(result.loss, case["policy_v"])[0]


def test_gradcheck_in_float64():
    case = random_case()
    assert torch.autograd.gradcheck(lambda policy: dgpo_loss(**(case | {"policy_v": policy})).loss, case["policy_v"])


def test_gradient_equals_central_differences_of_the_value():
    case = random_case()
    gradient = gradient_of(case)
    step = 1e-5
    for place in range(0, gradient.numel(), 5):
        shift = torch.zeros_like(gradient)
        shift.view(-1)[place] = step
        with torch.no_grad():
            values = [dgpo_loss(**(case | {"policy_v": case["policy_v"] + sign * shift})).loss for sign in (1, -1)]
        assert abs((values[0] - values[1]) / (2 * step) - gradient.view(-1)[place]) < 1e-6


def test_released_surrogate_has_the_same_gradient():
    """mean over groups of mean_i stop[σ(s_g)]·A_i·d_i, as the released code differentiates it."""
    case = random_case() | {"group_index": torch.tensor([4, 4, 9, 4, 9, 9, 4])[:7], "kl_weight": 0.0}
    result = dgpo_loss(**case)
    index, policy = case["group_index"], case["policy_v"]
    noise = philox_normal(policy.shape[1:], index, seed=SEED, draw=DRAW, dtype=torch.float64)
    dsm = (policy - (noise - case["x0"])).square().flatten(1).mean(1)
    weighted = torch.sigmoid(result.group_score) * case["advantage"] * dsm
    surrogate = torch.stack([weighted[index == group].mean() for group in (4, 9)]).mean()
    (expected,) = torch.autograd.grad(surrogate, policy)
    torch.testing.assert_close(gradient_of(case), expected, atol=1e-14, rtol=1e-12)


def test_the_order_of_samples_does_not_matter():
    case = random_case()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    shuffled = {name: value[order] if torch.is_tensor(value) else value for name, value in case.items()}
    shuffled["policy_v"] = shuffled["policy_v"].detach().requires_grad_()
    torch.testing.assert_close(dgpo_loss(**shuffled).loss, dgpo_loss(**case).loss)
    torch.testing.assert_close(gradient_of(shuffled), gradient_of(case)[order])


@pytest.mark.parametrize("clip_range", [None, 1e-2])
def test_parts_of_groups_add_up_to_the_whole(clip_range):
    """Two calls that each hold parts of two groups of three: values, scores and gradients are those of one call."""
    case = random_case(6) | {"group_index": torch.tensor([7, 8, 7, 8, 8, 7]), "clip_range": clip_range}
    whole = dgpo_loss(**case)
    expected = gradient_of(case)
    parts = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    sizes = {"num_groups": 2, "group_size": 3}

    def part_of(places):
        part = {name: value[places] if torch.is_tensor(value) else value for name, value in case.items()}
        return part | {"policy_v": part["policy_v"].detach().requires_grad_()}

    # What a sum over processes would give: each group's score added up over the calls.
    score = torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        for places in parts:
            partial = dgpo_loss(**part_of(places), **sizes).group_score
            for group in (7, 8):
                here = case["group_index"][places] == group
                if here.any():
                    score[case["group_index"] == group] += partial[here][0]
    torch.testing.assert_close(score, whole.group_score)
    total = 0.0
    for places in parts:
        part = part_of(places)
        result = dgpo_loss(**part, **sizes, reduce_group_scores=lambda _, places=places: score[places])
        total += result.loss.detach()
        (gradient,) = torch.autograd.grad(result.loss, part["policy_v"])
        torch.testing.assert_close(gradient, expected[places])
        torch.testing.assert_close(result.group_score, score[places])
        assert torch.equal(result.clipped, whole.clipped[places])
    torch.testing.assert_close(total, whole.loss.detach())


@pytest.mark.parametrize(
    ("advantage", "difference", "clipped"),
    [
        (1.0, math.log1p(0.1) + 1e-6, True),
        (1.0, math.log1p(0.1) - 1e-6, False),
        (1.0, -9.0, False),
        (-1.0, math.log1p(-0.1) - 1e-6, True),
        (-1.0, math.log1p(-0.1) + 1e-6, False),
        (-1.0, 9.0, False),
        (0.0, -9.0, True),
        (0.0, 9.0, False),
    ],
)
def test_clip_truth_table(advantage, difference, clipped):
    predictions, index = from_losses({"policy_v": [10.0], "ref_v": [9.0], "old_v": [10.0 + difference]}, [1])
    advantage = torch.tensor([advantage], dtype=torch.float64)
    result = dgpo_loss(
        **predictions, advantage=advantage, group_index=index, seed=SEED, draw=DRAW, beta=1.0, clip_range=0.1
    )
    assert result.clipped.tolist() == [clipped]


def test_a_clipped_sample_counts_in_the_score_and_keeps_its_kl_gradient():
    predictions, index = from_losses({"policy_v": [1.0, 1.0], "ref_v": [0.5, 0.5], "old_v": [4.0, 1.0]}, [1, 1])
    policy = predictions.pop("policy_v").requires_grad_()
    options = {"group_index": index, "seed": SEED, "draw": DRAW, "beta": 2.0, "clip_range": 0.1}
    advantage = torch.tensor([1.0, -0.5], dtype=torch.float64)
    free = dgpo_loss(policy, **predictions, advantage=advantage, **(options | {"clip_range": None}))
    cut = dgpo_loss(policy, **predictions, advantage=advantage, **options)
    assert torch.equal(cut.loss, free.loss) and torch.equal(cut.group_score, free.group_score)
    assert torch.autograd.grad(cut.loss, policy)[0][0] == 0
    held = dgpo_loss(policy, **predictions, advantage=advantage, kl_v=policy.detach() - 1, kl_weight=1.0, **options)
    torch.testing.assert_close(torch.autograd.grad(held.loss, policy)[0][0], torch.ones(1, dtype=torch.float64))


def test_equal_rewards_leave_only_the_kl_term():
    case = random_case() | {"advantage": torch.zeros(7, dtype=torch.float64)}
    policy, kl_v = case["policy_v"], case["kl_v"]
    result = dgpo_loss(**case)
    assert (result.group_score == 0).all()
    expected = 0.2 / 7 * 2 / 6 * (policy.detach() - kl_v)
    torch.testing.assert_close(gradient_of(case), expected)


@pytest.mark.parametrize("beta", [1e-3, 5000.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_values_stay_finite(beta, scale):
    generator = torch.Generator().manual_seed(3)
    policy, ref, x0, old = scale * torch.randn(4, 6, 50, generator=generator)
    policy.requires_grad_()
    for sign in (1.0, -1.0):
        result = dgpo_loss(
            policy,
            ref,
            x0,
            sign * 5 * torch.ones(6),
            torch.tensor([0, 0, 0, 1, 1, 1]),
            seed=0,
            draw=0,
            beta=beta,
            old_v=old,
            clip_range=1e-5,
        )
        assert result.loss.isfinite() and torch.autograd.grad(result.loss, policy)[0].isfinite().all()


def test_an_empty_batch_gives_zero():
    policy = torch.zeros(0, 3, requires_grad=True)
    empty, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    result = dgpo_loss(
        policy, policy.detach(), policy.detach(), empty, index, seed=0, draw=0, beta=1.0, kl_v=policy, kl_weight=1.0
    )
    assert result.loss == 0
    assert torch.autograd.grad(result.loss, policy)[0].shape == (0, 3)


def test_only_the_loss_is_differentiable():
    result = dgpo_loss(**random_case())
    assert result.loss.requires_grad and result.loss.shape == ()
    assert not any(tensor.requires_grad for tensor in result[1:] if tensor is not None)
    assert DGPOLoss._fields[0] == "loss"


def test_compiles_in_one_graph_for_all_batches():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(policy, case, draw):
        options = {name: value for name, value in case.items() if name not in ("policy_v", "draw")}
        return dgpo_loss(policy, **options, draw=draw, clip_range=1e-2, impl="eager").loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for batch in (6, 7, 4):
        case = random_case(batch)
        draw = torch.tensor(batch)
        torch.testing.assert_close(compiled(case["policy_v"], case, draw), step(case["policy_v"], case, draw))
    assert len(graphs) == 1


def test_compiled_implementation_equals_eager(within_budget):
    """Both are as near to float64 as fp32 allows: a score is β times a difference of losses, each of them rounded."""
    torch._dynamo.reset()
    case = random_case(dtype=torch.float32) | {"clip_range": 1e-2}
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    exact |= {"group_index": case["group_index"], "policy_v": case["policy_v"].detach().double().requires_grad_()}
    oracle, eager, compiled = (
        dgpo_loss(**given, impl=impl) for given, impl in ((exact, "eager"), (case, "eager"), (case, "compile"))
    )
    moved = torch.finfo(torch.float32).eps * case["beta"] * float((oracle.dsm_policy * exact["advantage"].abs()).max())
    extra = {"loss": moved / case["beta"], "group_score": moved}
    for name, *found in zip(DGPOLoss._fields, compiled, eager, oracle, strict=True):
        within_budget(name, *(tensor.detach() for tensor in found), extra.get(name, 0.0))
    found = (gradient_of(given, impl=impl) for given, impl in ((case, "compile"), (case, "eager"), (exact, "eager")))
    gradients = list(found)
    within_budget("gradient", *gradients, math.expm1(moved) * float(gradients[-1].abs().max()))
