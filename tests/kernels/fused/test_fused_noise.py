"""Philox and group noise in Triton against the eager implementation and the float64 oracle."""

import dgpo_kernels
import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from dgpo_kernels import reference
from dgpo_kernels.triton.philox import box_muller, group_words, log
from hypothesis import example, given, settings

SHAPES = [(1,), (2,), (3,), (7,), (257,), (1031,), (3, 5, 7), (4, 6, 10), (8, 4, 4), (12, 8, 8), (6, 3, 3)]
GROUPS = [0, 1, 7, -1, 2**40 + 3, -(2**63), 2**63 - 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On a GPU, examples are cheap; in the interpreter a program takes milliseconds.
PROFILE = settings(max_examples=25, deadline=None, derandomize=True)


@triton.jit
def _words_kernel(seed, draw, group, counter, out, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    block = tl.load(counter + place, mask=place < count, other=0)
    words = group_words(tl.load(seed), tl.load(draw), tl.load(group), block)
    for word in tl.static_range(4):
        tl.store(out + word * count + place, words[word].to(tl.int64), mask=place < count)


@triton.jit
def _normals_kernel(words, first, second, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    word_u = tl.load(words + place, mask=place < count, other=0).to(tl.uint32)
    word_v = tl.load(words + count + place, mask=place < count, other=0).to(tl.uint32)
    a, b = box_muller(word_u, word_v)
    tl.store(first + place, a, mask=place < count)
    tl.store(second + place, b, mask=place < count)


@triton.jit
def _log_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, log(tl.load(x + place)))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_random123s(counter, key, expected, device):
    def signed(value: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(value - (1 << bits) if value >= 1 << (bits - 1) else value, dtype=dtype, device=device)

    seed = signed(key[0] | key[1] << 32, 64, torch.int64)
    group = signed(counter[1] | counter[2] << 32, 64, torch.int64)
    draw = torch.tensor(counter[3], device=device)
    block = signed(counter[0], 32, torch.int32).reshape(1)
    out = torch.empty(4, dtype=torch.int64, device=device)
    _words_kernel[(1,)](seed, draw, group, block, out, 1, BLOCK=16)
    assert tuple(word & 0xFFFFFFFF for word in out.tolist()) == expected


def test_words_equal_eager_beyond_two_to_the_31_counters(device):
    counter = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1], device=device)
    seed, draw, group = (torch.tensor(value, device=device) for value in (-(2**62), 2**32 - 1, -12345678901234))
    out = torch.empty(4, 5, dtype=torch.int64, device=device)
    _words_kernel[(1,)](seed, draw, group, counter.to(torch.int32), out, 5, BLOCK=16)
    words = (counter, group & reference.WORD, (group >> 32) & reference.WORD, draw)
    expected = reference.philox_4x32(words, (seed & reference.WORD, (seed >> 32) & reference.WORD))
    assert torch.equal(out & reference.WORD, torch.stack([word.expand(5) for word in expected]))


def test_normals_of_extreme_words(device):
    values = [0, 1, 2, 2**8, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 2, 2**32 - 1]
    u, v = torch.cartesian_prod(torch.tensor(values), torch.tensor(values)).unbind(1)
    first, second = torch.empty(2, len(u), device=device)
    _normals_kernel[(1,)](torch.stack([u, v]).to(device), first, second, len(u), BLOCK=256)
    for got, expected in zip((first, second), reference.box_muller(u, v, torch.float64), strict=True):
        torch.testing.assert_close(got.double().cpu(), expected, atol=1e-6, rtol=1e-7)


def test_log_is_right_to_two_units_in_the_last_place(device):
    x = torch.cat([torch.logspace(-10, 0, 4000), 1 - torch.logspace(-7.2, -0.3, 4000), 1 + torch.linspace(0, 1, 192)])
    x = x.to(device)
    out = torch.empty_like(x)
    _log_kernel[(1,)](x, out, BLOCK=8192)
    exact = x.double().log()
    unit = torch.finfo(torch.float32).eps * exact.abs().clamp(min=torch.finfo(torch.float32).tiny)
    assert ((out.double() - exact).abs() <= 2 * unit).all()


@PROFILE
@given(
    shape=st.sampled_from(SHAPES),
    groups=st.lists(st.sampled_from(GROUPS), max_size=6),
    seed=st.integers(-(2**63), 2**64 - 1),
    draw=st.integers(0, 2**32 - 1),
)
@example(shape=(16, 64, 64), groups=[3, 5], seed=1, draw=2)
def test_normals_equal_eager_and_the_oracle(shape, groups, seed, draw, device):
    index = torch.tensor(groups, dtype=torch.int64, device=device)
    fused = dgpo_kernels.philox_normal(shape, index, seed=seed, draw=draw, impl="triton")
    eager = dgpo_kernels.philox_normal(shape, index, seed=seed, draw=draw, impl="eager")
    oracle = dgpo_kernels.philox_normal(shape, index, seed=seed, draw=draw, dtype=torch.float64, impl="eager")
    torch.testing.assert_close(fused, eager, atol=1e-6, rtol=0)
    torch.testing.assert_close(fused.double(), oracle, atol=1e-6, rtol=0)


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The values of x in another memory layout."""
    if kind == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        return torch.stack([x, x], 1)[:, 0]
    if kind == "transposed" and x.dim() > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if kind == "gapped":
        return torch.stack([x, x], -1)[..., 0]
    return x


@PROFILE
@given(
    shape=st.sampled_from(SHAPES),
    groups=st.lists(st.sampled_from(GROUPS), max_size=6),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["contiguous", "channels_last", "sliced", "transposed", "gapped"]),
    per_sample=st.booleans(),
    scale=st.sampled_from([1.0, 1e4]),
)
@example(shape=(16, 64, 64), groups=[3], dtype=torch.bfloat16, kind="contiguous", per_sample=True, scale=1.0)
@example(shape=(16, 8, 8), groups=[3, 3, 4], dtype=torch.float32, kind="channels_last", per_sample=False, scale=1.0)
def test_group_noise_is_within_budget(shape, groups, dtype, kind, per_sample, scale, device, within_budget):
    generator = torch.Generator().manual_seed(len(groups))
    x0 = (scale * torch.randn(len(groups), *shape, generator=generator)).to(dtype).to(device)
    sigma = torch.rand((len(groups),) if per_sample else (), generator=generator).to(device)
    index = torch.tensor(groups, dtype=torch.int64, device=device)
    given_x0 = strided(x0, kind)
    options = {"seed": 11, "draw": 5}
    fused = dgpo_kernels.group_noise(given_x0, sigma, index, impl="triton", **options)
    eager = dgpo_kernels.group_noise(x0, sigma, index, impl="eager", **options)
    oracle = dgpo_kernels.group_noise(x0.double(), sigma.double(), index, impl="eager", **options)
    within_budget("x_t", fused, eager, oracle)
    if len(groups) > 1 and kind == "channels_last" and shape[0] % 4 == 0 and len(shape) == 3:
        assert fused.is_contiguous(memory_format=torch.channels_last)


def test_group_noise_beyond_two_to_the_31_elements(device):
    # Two samples far apart: the distance overflows 32 bits, the memory between them is never touched.
    numel, distance = 96, 2**31 + 7
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(distance + numel, dtype=torch.float16, device=device)
    x0 = memory.as_strided((2, numel), (distance, 1))
    x0.copy_(torch.randn(2, numel))
    index = torch.tensor([4, 4], device=device)
    sigma = torch.tensor(0.5, device=device)
    fused = dgpo_kernels.group_noise(x0, sigma, index, seed=1, draw=1, impl="triton")
    eager = dgpo_kernels.group_noise(x0.contiguous(), sigma, index, seed=1, draw=1, impl="eager")
    torch.testing.assert_close(fused, eager, atol=1e-3, rtol=1e-3)


def test_operators_pass_opcheck(device):
    index = torch.tensor([2, 2, 9], device=device)
    seed, draw = torch.tensor(3, device=device), torch.tensor(4, device=device)
    x0, sigma = torch.randn(3, 4, 2, 2, device=device), torch.rand(3, device=device)
    torch.library.opcheck(torch.ops.dgpo_kernels.philox_normal, ([5], index, seed, draw, torch.float32))
    for x in (x0, x0.contiguous(memory_format=torch.channels_last), x0.bfloat16()[:, :3]):
        torch.library.opcheck(torch.ops.dgpo_kernels.group_noise, (x, sigma, index, seed, draw))
