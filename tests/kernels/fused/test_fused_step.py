"""Guided solver steps in Triton against the float64 oracle."""

import dgpo_kernels
import hypothesis.strategies as st
import torch
from hypothesis import given, settings

SHAPES = [(1,), (7,), (1031,), (3, 5, 7), (4, 8, 8)]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
PROFILE = settings(max_examples=40, deadline=None, derandomize=True)
CASES = {
    "shape": st.sampled_from(SHAPES),
    "batch": st.integers(0, 3),
    "cond_dtype": DTYPES,
    "uncond_dtype": st.one_of(st.none(), DTYPES),
    "guidance_scale": st.sampled_from([1.0, 4.5]),
    "scale": st.sampled_from([1.0, 1e4]),
    "channels_last": st.booleans(),
}


def make_inputs(shape, batch, cond_dtype, uncond_dtype, scale, channels_last, device):
    generator = torch.Generator().manual_seed(batch)
    x, v_cond, v_uncond, x0_prev = (scale * torch.randn(4, batch, *shape, generator=generator)).to(device).unbind()
    if channels_last and len(shape) == 3:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, v_cond.to(cond_dtype), None if uncond_dtype is None else v_uncond.to(uncond_dtype), x0_prev


def double(tensor):
    return None if tensor is None else tensor.double()


@PROFILE
@given(**CASES)
def test_euler_step(
    shape, batch, cond_dtype, uncond_dtype, guidance_scale, scale, channels_last, device, within_budget
):
    x, cond, uncond, _ = make_inputs(shape, batch, cond_dtype, uncond_dtype, scale, channels_last, device)
    coefficients = torch.tensor([-0.137], device=device)
    step = dgpo_kernels.guided_euler_step
    options = {"guidance_scale": guidance_scale, "coefficients": coefficients}
    fused, eager = (step(x, cond, uncond, **options, impl=impl) for impl in ("triton", "eager"))
    oracle = step(x.double(), cond.double(), double(uncond), **options, impl="eager")
    within_budget("x_next", fused, eager, oracle)


@PROFILE
@given(**CASES, has_prev=st.booleans())
def test_dpmpp_2m_step(
    shape, batch, cond_dtype, uncond_dtype, guidance_scale, scale, channels_last, has_prev, device, within_budget
):
    x, cond, uncond, prev = make_inputs(shape, batch, cond_dtype, uncond_dtype, scale, channels_last, device)
    prev = prev if has_prev else None
    coefficients = torch.tensor([0.8, 0.6, 0.55, -0.15], device=device)
    step = dgpo_kernels.guided_dpmpp_2m_step
    options = {"guidance_scale": guidance_scale, "coefficients": coefficients}
    fused, eager = (step(x, cond, uncond, prev, **options, impl=impl) for impl in ("triton", "eager"))
    oracle = step(x.double(), cond.double(), double(uncond), double(prev), **options, impl="eager")
    for name, *values in zip(("x_next", "x0"), fused, eager, oracle, strict=True):
        within_budget(name, *values)


def test_operators_pass_opcheck(device):
    x, cond, uncond, prev = make_inputs((4, 2, 2), 3, torch.bfloat16, torch.bfloat16, 1.0, True, device)
    euler, dpmpp = torch.tensor([0.1], device=device), torch.tensor([0.8, 0.6, 0.5, -0.1], device=device)
    for other in (uncond, None):
        torch.library.opcheck(torch.ops.dgpo_kernels.guided_euler_step, (x, cond, other, 4.5, euler))
    for last in (prev, None):
        arguments = (x, cond, uncond, last, 4.5, dpmpp)
        torch.library.opcheck(torch.ops.dgpo_kernels.guided_dpmpp_2m_step, arguments)
