"""A guided solver step in one pass: classifier-free guidance and the update, read once and written once.

    v = v_uncond + g·(v_cond − v_uncond)
    Euler: x_next = x + Δσ·v
    DPM-Solver++(2M): x0 = x − σ·v,  x_next = a·x + b·x0 + c·x0_prev

The operation is elementwise, so that any layout without gaps goes if all tensors share it; one that does not is copied.
Coefficients are read from the device: a captured graph takes new ones at each replay.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels.triton.launch import COMPILER_OPTIONS, device_of

BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _place(numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return place, place < numel


@triton.jit
def _guided(v_cond, v_uncond, place, mask, guidance_scale, GUIDED: tl.constexpr):
    v = tl.load(v_cond + place, mask=mask).to(tl.float32)
    if GUIDED:
        uncond = tl.load(v_uncond + place, mask=mask).to(tl.float32)
        v = uncond + guidance_scale * (v - uncond)
    return v


@triton.jit
def _euler_kernel(
    x, v_cond, v_uncond, coefficients, x_next, numel, guidance_scale, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):
    place, mask = _place(numel, BLOCK)
    v = _guided(v_cond, v_uncond, place, mask, guidance_scale, GUIDED)
    state = tl.load(x + place, mask=mask)
    tl.store(x_next + place, state + tl.load(coefficients) * v, mask=mask)


@triton.jit
def _dpmpp_2m_kernel(
    x,
    v_cond,
    v_uncond,
    x0_prev,
    coefficients,
    x_next,
    x0,
    numel,
    guidance_scale,
    GUIDED: tl.constexpr,
    HAS_PREV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, mask = _place(numel, BLOCK)
    v = _guided(v_cond, v_uncond, place, mask, guidance_scale, GUIDED)
    state = tl.load(x + place, mask=mask)
    clean = state - tl.load(coefficients) * v
    value = tl.load(coefficients + 1) * state + tl.load(coefficients + 2) * clean
    if HAS_PREV:
        value += tl.load(coefficients + 3) * tl.load(x0_prev + place, mask=mask)
    tl.store(x0 + place, clean, mask=mask)
    tl.store(x_next + place, value, mask=mask)


def _like(out: Tensor, tensor: Tensor | None) -> Tensor | None:
    """``tensor`` itself if it has out's strides, else a copy that has."""
    if tensor is None or tensor.stride() == out.stride():
        return tensor
    return torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)


def guided_euler_step(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance_scale: float, coefficients: Tensor
) -> Tensor:
    """x_next of :func:`dgpo_kernels.guided_euler_step`, in x's layout."""
    x_next = torch.empty_like(x)
    if x.numel() == 0:
        return x_next
    with device_of(x):
        _euler_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            _like(x_next, x),
            _like(x_next, v_cond),
            _like(x_next, v_uncond),
            coefficients.float().contiguous(),
            x_next,
            x.numel(),
            guidance_scale,
            GUIDED=v_uncond is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            **COMPILER_OPTIONS,
        )
    return x_next


def guided_dpmpp_2m_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    x0_prev: Tensor | None,
    guidance_scale: float,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """(x_next, x0) of :func:`dgpo_kernels.guided_dpmpp_2m_step`, in x's layout."""
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    if x.numel() == 0:
        return x_next, x0
    with device_of(x):
        _dpmpp_2m_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            _like(x_next, x),
            _like(x_next, v_cond),
            _like(x_next, v_uncond),
            _like(x_next, x0_prev),
            coefficients.float().contiguous(),
            x_next,
            x0,
            x.numel(),
            guidance_scale,
            GUIDED=v_uncond is not None,
            HAS_PREV=x0_prev is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            **COMPILER_OPTIONS,
        )
    return x_next, x0
