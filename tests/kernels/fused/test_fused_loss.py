"""The fused DGPO loss against the float64 oracle, its operators, and its use under torch.compile."""

import math

import dgpo_kernels
import hypothesis.strategies as st
import pytest
import torch
from dgpo_kernels import ops, reference
from dgpo_kernels.triton import noise
from dgpo_kernels.triton.group_loss import group_loss
from dgpo_kernels.triton.launch import FORWARD_CONFIG, NOISE_CONFIG, TileConfig
from dgpo_kernels.triton.loss_partials import loss_partials
from dgpo_kernels.triton.policy_gradient import policy_gradient
from hypothesis import example, given, settings

SHAPES = [(1,), (2,), (7,), (131,), (1031,), (3, 5, 7), (8, 4, 4), (12, 8, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = st.one_of(
    st.lists(st.sampled_from([0, 1, -5, 2**60]), max_size=7),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    st.builds(
        lambda groups, size: [g for g in range(groups) for _ in range(size)], st.integers(1, 3), st.integers(1, 4)
    ),
)
NAMES = ("policy_v", "ref_v", "x0", "old_v", "kl_v")
RESULTS = ("loss", "dsm_policy", "dsm_ref", "dsm_old", "kl", "group_score")
CASES = {
    "shape": st.sampled_from(SHAPES),
    "groups": GROUPS,
    "dtypes": st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    "old": st.sampled_from([None, "given", "clip"]),
    "kl": st.sampled_from([None, "ref", "own", "unweighted"]),
    "beta": st.sampled_from([1e-2, 100.0, 5000.0]),
    "scale": st.sampled_from([1.0, 1.0, 100.0]),
    "whole": st.sampled_from([(None, None), (5, None), (None, 3), (5, 3)]),
    "hook": st.booleans(),
    "layout": st.sampled_from(["contiguous", "channels_last", "mixed"]),
}


def make_inputs(shape, groups, dtypes, scale, device):
    generator = torch.Generator().manual_seed(len(groups))

    def randn(*size):
        return torch.randn(size, generator=generator)

    batch = len(groups)
    policy = scale * randn(batch, *shape)
    near = {"ref_v": 0.3, "old_v": 0.01, "kl_v": 0.5}
    tensors = {"policy_v": policy, "x0": scale * randn(batch, *shape)}
    tensors |= {name: policy + distance * randn(batch, *shape) for name, distance in near.items()}
    tensors = {name: tensors[name].to(dtype).to(device) for name, dtype in zip(NAMES, dtypes, strict=True)}
    advantage = randn(batch).clamp(-5, 5).to(device)
    return tensors, advantage, torch.tensor(groups, dtype=torch.int64, device=device)


def run(impl, inputs, old, kl, beta, whole, hook, layout="contiguous", oracle=False):
    """The loss and its gradient; the oracle computes in float64 from the same rounded inputs."""
    tensors, advantage, group_index = inputs
    tensors = {name: tensor.double() if oracle else tensor for name, tensor in tensors.items()}
    if layout != "contiguous" and tensors["x0"].dim() == 4:
        others = () if layout == "channels_last" else ("ref_v", "old_v")
        tensors = {
            name: tensor if name in others else tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in tensors.items()
        }
    policy = tensors["policy_v"].detach().requires_grad_()
    options = {}
    if old:
        options |= {"old_v": tensors["old_v"], "clip_range": 1e-3 if old == "clip" else None}
    if kl:
        options |= {"kl_v": tensors["ref_v"] if kl == "ref" else tensors["kl_v"]}
        options |= {"kl_weight": 0.0 if kl == "unweighted" else 0.3}
    result = dgpo_kernels.dgpo_loss(
        policy,
        tensors["ref_v"],
        tensors["x0"],
        advantage.double() if oracle else advantage,
        group_index,
        seed=17,
        draw=3,
        beta=beta,
        num_groups=whole[0],
        group_size=whole[1],
        reduce_group_scores=(lambda scores: 0.5 * scores - 1.0) if hook else None,
        impl=impl,
        **options,
    )
    (gradient,) = torch.autograd.grad(result.loss, policy)
    return result, gradient


def check_all(fused, gradient, eager, eager_gradient, oracle, oracle_gradient, advantage, beta, within_budget):
    """Every result within its budget, where the rounding of d, once, may move a score by ``moved``."""
    losses = [loss for loss in (oracle.dsm_policy, oracle.dsm_ref) if loss.numel()]
    spread = max((float(loss.max() * advantage.abs().max()) for loss in losses), default=0.0)
    moved = torch.finfo(torch.float32).eps * beta * spread
    extra = {"loss": moved / beta, "group_score": moved}
    for name in RESULTS:
        if getattr(oracle, name) is None:
            assert getattr(fused, name) is None
            continue
        within_budget(name, *(getattr(r, name).detach() for r in (fused, eager, oracle)), extra.get(name, 0.0))
    assert torch.equal(fused.clipped, oracle.clipped)
    # σ(s + δ) ≤ e^δ·σ(s).
    peak = float(oracle_gradient.abs().max()) if oracle_gradient.numel() else 0.0
    within_budget("gradient", gradient, eager_gradient, oracle_gradient, math.expm1(min(moved, 50)) * peak)


def log_ratio_margin(oracle, clip_range):
    """How far the nearest sample is from the clip's edge: nearer than float32 can tell, either decision is right."""
    if oracle.dsm_old is None or oracle.dsm_old.numel() == 0:
        return torch.inf
    ratio = oracle.dsm_old - oracle.dsm_policy
    edges = torch.log1p(torch.tensor([-clip_range, clip_range], device=ratio.device, dtype=ratio.dtype))
    return ((ratio[:, None] - edges).abs() / oracle.dsm_policy[:, None].clamp(min=1)).min()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**CASES)
@example(
    shape=(16, 64, 64),
    groups=[3, 3],
    dtypes=[torch.bfloat16] * 5,
    old="clip",
    kl="own",
    beta=100.0,
    scale=1.0,
    whole=(None, None),
    hook=False,
    layout="contiguous",
)
@example(
    shape=(16, 8, 8),
    groups=[3, 9, 3],
    dtypes=[torch.float16, torch.float32, torch.bfloat16, torch.float32, torch.float16],
    old="clip",
    kl="own",
    beta=5000.0,
    scale=1e4,
    whole=(None, None),
    hook=True,
    layout="channels_last",
)
def test_loss_and_gradient_are_within_budget(
    shape, groups, dtypes, old, kl, beta, scale, whole, hook, layout, device, within_budget
):
    inputs = make_inputs(shape, groups, dtypes, scale, device)
    options = (inputs, old, kl, beta, whole, hook)
    oracle, oracle_gradient = run("eager", *options, oracle=True)
    if old == "clip" and log_ratio_margin(oracle, 1e-3) < 1e-5:
        return
    eager, eager_gradient = run("eager", *options)
    fused, gradient = run("triton", *options, layout=layout)
    assert fused.loss.isfinite() and gradient.isfinite().all()
    results = (fused, gradient, eager, eager_gradient, oracle, oracle_gradient)
    check_all(*results, inputs[1], beta, within_budget)


@pytest.mark.parametrize("groups", [[], [4], [1] * 5, list(range(66)), [i % 3 for i in range(70)]])
def test_group_layouts(groups, device, within_budget):
    """Empty, single, one group, all distinct (more than a step of the score kernel), and interleaved groups."""
    inputs = make_inputs((5,), groups, [torch.float32] * 5, 1.0, device)
    options = (inputs, "clip", "own", 50.0, (None, None), False)
    oracle, oracle_gradient = run("eager", *options, oracle=True)
    eager, eager_gradient = run("eager", *options)
    fused, gradient = run("triton", *options)
    results = (fused, gradient, eager, eager_gradient, oracle, oracle_gradient)
    check_all(*results, inputs[1], 50.0, within_budget)


@pytest.mark.parametrize("samples, tiles, known", [(270, 3, False), (33, 19, True), (1, 1, False)])
def test_sums_of_many_samples_and_tiles(samples, tiles, known, device, within_budget):
    """More than a block of each kind: rows, samples, tiles; interleaved groups."""
    generator = torch.Generator().manual_seed(samples)
    partials = torch.rand(4, samples, tiles, generator=generator).to(device)
    advantage = torch.randn(samples, generator=generator).to(device)
    index = (torch.arange(samples) % 3).to(device)
    numel, sizes = 7 * tiles, (3, samples // 3) if known else (None, None)
    fused = group_loss(partials, numel, advantage, index, None, True, True, 50.0, 1e-3, 0.02 / samples, *sizes)
    results = {}
    for dtype in (torch.float32, torch.float64):
        losses = reference.SampleLosses(*(partials.to(dtype).sum(2) / numel))
        score = reference.group_scores(losses, advantage, index, 50.0, sizes[1])
        loss, clipped = reference.loss_from_scores(losses, score, advantage, index, 50.0, 1e-3, 0.0, *sizes)
        weights = torch.sigmoid(score) * advantage / (sizes[1] or reference.same_group(index).sum(1))
        kl = 0.02 / samples * losses.kl.sum()
        results[dtype] = {"loss": loss + kl, "losses": torch.stack(losses), "scores": score, "clipped": clipped}
        results[dtype]["weights"] = torch.where(clipped, 0.0, weights)
    eager, oracle = results.values()
    for name, value in zip(("loss", "losses", "scores", "clipped", "weights"), fused, strict=False):
        within_budget(name, value, eager[name], oracle[name])
    assert fused[5] == pytest.approx(1 / min(samples, 3))


@pytest.mark.parametrize("span", [1, 2, 8])
def test_any_span_gives_the_same_bits(span, device):
    """Noise, sums and gradient of groups that a program holds whole, in parts, or several of."""
    policy, ref, x0 = torch.randn(3, 7, 8, 8, 8, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    numbers = (torch.tensor(5, device=device), torch.tensor(6, device=device))
    index, weights = torch.tensor([3, 3, 3, 4, 9, 9, 3], device=device), torch.rand(7, device=device)
    one = torch.ones((), device=device)
    found = []
    for config in (TileConfig(256, 8, span=3), TileConfig(256, 8, span=span)):
        out = torch.empty_like(x0)
        noise._launch(x0, weights, index, *numbers, out, 0, config)
        sums = loss_partials(policy, ref, x0, None, ref, True, index, *numbers, config)
        found.append((out, sums, policy_gradient(one, policy, x0, ref, index, *numbers, weights, one, 0.1, config)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("samples, spans", [(24, (1, 2)), (48, (2, 3)), (96, (4, 6)), (192, (8, 6))])
def test_spans_fill_whole_waves(samples, spans):
    """At SD3.5's size on the 132 SMs of an H200: of noise, with three programs an SM, and of the loss, with two."""
    for config, span in zip((NOISE_CONFIG, FORWARD_CONFIG), spans, strict=True):
        _, tiles, _, _, warps = config.tiles(65536, 2)
        assert (tiles, warps) == (16, 4)
        assert config.span_of(samples, tiles, warps, torch.device("cpu")) == span


def test_same_bits_every_run(device):
    inputs = make_inputs((12, 8, 8), [0, 1, 0, 1], [torch.bfloat16] * 5, 1.0, device)
    first, first_gradient = run("triton", inputs, "clip", "own", 100.0, (None, None), False)
    second, second_gradient = run("triton", inputs, "clip", "own", 100.0, (None, None), False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first_gradient, second_gradient)


def test_noise_of_the_loss_is_that_of_group_noise(device):
    """With policy_v = ε − x0 the denoising loss is zero, whichever kernel made ε."""
    index = torch.tensor([3, 3, 8], device=device)
    x0 = torch.randn(3, 12, 8, 8, device=device)
    noise = dgpo_kernels.philox_normal(x0.shape[1:], index, seed=17, draw=3, impl="triton")
    loss = dgpo_kernels.dgpo_loss(
        noise - x0, x0, x0, torch.ones(3, device=device), index, seed=17, draw=3, beta=1.0, impl="triton"
    )
    assert (loss.dsm_policy < 1e-12).all()


def test_operators_pass_opcheck(device):
    tensors, advantage, index = make_inputs((4, 2, 2), [2, 2, 9], [torch.float32] * 5, 1.0, device)
    seed, draw = torch.tensor(3, device=device), torch.tensor(4, device=device)
    policy, ref, x0, old, kl = (tensors[name] for name in NAMES)
    namespace = torch.ops.dgpo_kernels
    for arguments in ((None, None, False), (old, kl, False), (old, ref, True)):
        torch.library.opcheck(namespace.loss_partials, (policy, ref, x0, *arguments, index, seed, draw))
    partials = ops.loss_partials(policy, ref, x0, old, kl, False, index, seed, draw)
    torch.library.opcheck(namespace.group_scores, (partials, 16, advantage, index, 10.0, None))
    policy = policy.clone().requires_grad_()
    noise = (index, seed, draw)
    torch.library.opcheck(
        namespace.group_loss,
        (policy, x0, kl, *noise, partials, advantage, None, True, 10.0, 1e-2, 0.1, 3, None, None),
        # The value comes from the partial sums, not from policy_v, so that the general gradient test has nothing to
        # vary. test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    *_, weights, inverse_groups = ops.group_loss(
        policy, x0, kl, *noise, partials, advantage, None, True, 10.0, 1e-2, 0.1, 3, None, None
    )
    grad = torch.tensor(2.0, device=device)
    arguments = (grad, policy.detach(), x0, kl, *noise, weights.detach(), inverse_groups.detach(), 0.1, 3)
    torch.library.opcheck(namespace.policy_gradient, arguments)


@pytest.mark.parametrize("hook", [False, True])
def test_compiles_without_a_graph_break_and_once_for_all_batches(hook, device):
    torch._dynamo.reset()
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def step(policy, ref, x0, old, advantage, index, seed, draw):
        x_t = dgpo_kernels.group_noise(x0, advantage.abs(), index, seed=seed, draw=draw, impl="triton")
        result = dgpo_kernels.dgpo_loss(
            policy,
            ref,
            x0,
            advantage,
            index,
            seed=seed,
            draw=draw,
            beta=10.0,
            old_v=old,
            clip_range=1e-2,
            kl_v=ref,
            kl_weight=0.1,
            reduce_group_scores=(lambda scores: 2 * scores) if hook else None,
            impl="triton",
        )
        return x_t, result

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    seed = torch.tensor(5, device=device)
    for batch in (6, 9, 4):
        tensors, advantage, index = make_inputs((8, 4, 4), list(range(batch)), [torch.float32] * 5, 1.0, device)
        draw = torch.tensor(batch, device=device)
        arguments = (tensors["ref_v"], tensors["x0"], tensors["old_v"], advantage, index, seed, draw)
        policy = tensors["policy_v"].requires_grad_()
        expected_x_t, expected = step(policy, *arguments)
        (expected_gradient,) = torch.autograd.grad(expected.loss, policy)
        x_t, result = compiled(policy, *arguments)
        (gradient,) = torch.autograd.grad(result.loss, policy)
        torch.testing.assert_close((x_t, result.loss, gradient), (expected_x_t, expected.loss, expected_gradient))
    assert len(compilations) == 1
