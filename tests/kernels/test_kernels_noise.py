"""Philox noise: known answers, what it depends on, and its distribution on 10⁷ values."""

import pytest
import scipy.stats
import torch
from dgpo_kernels import group_noise, philox_normal
from dgpo_kernels.reference import philox_4x32

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(counter, key, expected):
    words = philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == expected


def test_a_row_depends_on_seed_draw_and_group_alone():
    groups = torch.tensor([5, -3, 5, 2**40, 2**40 + 2**33])
    noise = philox_normal((3, 5), groups, seed=1, draw=2)
    assert torch.equal(noise[0], noise[2])
    for row, group in zip(noise, groups, strict=True):
        assert torch.equal(row, philox_normal((3, 5), group[None], seed=1, draw=2)[0])
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 4
    for other in ({"seed": 2, "draw": 2}, {"seed": 1, "draw": 3}, {"seed": 1 + 2**32, "draw": 2}):
        assert not torch.isclose(noise, philox_normal((3, 5), groups, **other)).any()


def test_integers_and_tensors_are_the_same_seed_and_draw():
    groups = torch.tensor([1, 2])
    for seed, draw in ((0, 0), (-1, 5), (2**63 + 11, 2**32 - 1)):
        signed = seed - 2**64 if seed >= 2**63 else seed
        expected = philox_normal((9,), groups, seed=seed, draw=draw)
        given = philox_normal((9,), groups, seed=torch.tensor(signed), draw=torch.tensor(draw))
        assert torch.equal(given, expected)
    assert torch.equal(
        philox_normal((9,), groups, seed=-1, draw=0), philox_normal((9,), groups, seed=2**64 - 1, draw=0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_noise_is_the_rounded_float64_noise(dtype):
    groups = torch.arange(50)
    exact = philox_normal((1001,), groups, seed=3, draw=4, dtype=torch.float64)
    noise = philox_normal((1001,), groups, seed=3, draw=4, dtype=dtype)
    assert noise.dtype == dtype
    torch.testing.assert_close(noise.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_group_noise_is_the_flow_between_data_and_noise():
    x0 = torch.randn(3, 4, 5, 6)
    groups = torch.tensor([1, 1, 2])
    noise = philox_normal((4, 5, 6), groups, seed=8, draw=9)
    sigma = torch.tensor([0.0, 1.0, 0.25])
    x_t = group_noise(x0, sigma, groups, seed=8, draw=9)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.75 * x0[2] + 0.25 * noise[2])
    everywhere = group_noise(x0, torch.tensor(0.25), groups, seed=8, draw=9)
    assert torch.equal(everywhere[2], x_t[2])


def test_group_noise_is_data_not_part_of_the_graph():
    x0 = torch.randn(2, 4, requires_grad=True)
    assert not group_noise(x0, torch.rand(2), torch.tensor([0, 1]), seed=0, draw=0).requires_grad


# 10⁷ values each: enough groups, draws or elements to see a pattern in any of them.
LAYOUTS = {
    "elements": lambda: philox_normal((10_000_000,), torch.tensor([7]), seed=1, draw=1),
    "groups": lambda: philox_normal((100,), torch.arange(100_000), seed=2, draw=3),
    "draws": lambda: torch.cat(
        [philox_normal((100_000,), torch.tensor([-5]), seed=4, draw=draw) for draw in range(100)]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_standard_normal(layout):
    values = LAYOUTS[layout]().flatten().double()
    count = len(values)
    assert count == 10_000_000
    # Moments E xᵏ, within five standard errors sqrt((E x²ᵏ − (E xᵏ)²)/n).
    for power, mean, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (5, 0, 945), (6, 15, 10395)):
        error = ((square - mean**2) / count) ** 0.5
        assert abs(values.pow(power).mean() - mean) < 5 * error, power
    # Kolmogorov–Smirnov: the greatest distance of the distribution functions, against its 10⁻⁴ quantile.
    ordered = torch.special.ndtr(values.sort().values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance < scipy.stats.kstwobign.isf(1e-4) / count**0.5
    # The tail reaches as far as a normal one does: P(|x| > 5) = 5.7e-7.
    assert 0 < (values.abs() > 5).sum() < 25


@pytest.mark.parametrize("axis", ["elements", "quarters", "groups", "draws", "seeds"])
def test_neighbours_are_independent(axis):
    """Correlations of values, and of their squares, between neighbours along each part of the counter and the key."""
    count = 2_000_000
    if axis in ("elements", "quarters"):
        values = philox_normal((4 * count,), torch.tensor([3]), seed=5, draw=6)[0]
        pairs = (values[:-1], values[1:]) if axis == "elements" else tuple(values.view(4, count)[[0, 1]])
    elif axis == "groups":
        values = philox_normal((count // 1000,), torch.arange(1001), seed=5, draw=6)
        pairs = (values[:-1].flatten(), values[1:].flatten())
    else:
        options = [{"seed": 5, "draw": 6}, {"seed": 5, "draw": 7} if axis == "draws" else {"seed": 6, "draw": 6}]
        pairs = tuple(philox_normal((count,), torch.tensor([3]), **option)[0] for option in options)
    first, second = (half.double() for half in pairs)
    for transform in (lambda x: x, lambda x: (x.square() - 1) / 2**0.5):
        correlation = (transform(first) * transform(second)).mean()
        assert abs(correlation) < 5 / len(first) ** 0.5


@pytest.mark.parametrize("elements", [6, 64, 1001])
def test_compiled_noise_is_the_same(elements):
    """In float64, so that one wrong bit of a random word would show: Inductor once took its products for addresses."""
    groups = torch.tensor([0, 1, -3, 2**40])
    eager, compiled = (
        philox_normal((elements,), groups, seed=3, draw=4, dtype=torch.float64, impl=impl)
        for impl in ("eager", "compile")
    )
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-12)
