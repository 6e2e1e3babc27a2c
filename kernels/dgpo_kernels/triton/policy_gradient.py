"""The DGPO loss, backward launch: the gradient in policy_v from policy_v, x0 and kl_v, each read once.

    ∂loss/∂policy_v,i = (2/N)·[w_i·(policy_v,i − v*_i) + κ·(policy_v,i − kl_v,i)],   v* = ε − x0,   κ = kl_weight/B

w_i is :mod:`dgpo_kernels.triton.group_loss`'s; ε is made again in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels import layout
from dgpo_kernels.triton.launch import BACKWARD_CONFIG, COMPILER_OPTIONS, TileConfig, device_of, tile_grid
from dgpo_kernels.triton.philox import group_normals, load, store, tile_places, word_mask, word_shift


@triton.jit(do_not_specialize=["samples", "tiles"])
def _gradient_kernel(
    grad_loss,
    policy,
    x0,
    kl,
    group_index,
    seed,
    draw,
    weights,
    inverse_groups,
    grad,
    samples,
    tiles,
    numel,
    quarter,
    policy_stride,
    x0_stride,
    kl_stride,
    two_over_numel,
    kl_scale,
    HAS_KL: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles).to(tl.int64) * SPAN
    counter, start, offset, lane = tile_places(tile, quarter, CHANNELS, BLOCK, VECTOR)
    seed_value = tl.load(seed)
    draw_value = tl.load(draw)
    group = tl.load(group_index + first)
    noise = group_normals(seed_value, draw_value, group, counter)
    scale = tl.load(grad_loss).to(tl.float32) * two_over_numel
    kl_weight = scale * kl_scale
    scale = scale * tl.load(inverse_groups)
    for step in range(0, min(SPAN, samples - first)):
        sample = first + step
        sample_group = tl.load(group_index + sample)
        if sample_group != group:
            group = sample_group
            noise = group_normals(seed_value, draw_value, group, counter)
        weight = scale * tl.load(weights + sample)
        for word in tl.static_range(4):
            place = start + word_shift(word, quarter, CHANNELS)
            mask = word_mask(word, tile, lane, numel, quarter, BLOCK)
            policy_v = load(policy + sample * policy_stride + place, offset, mask, EVEN)
            clean = load(x0 + sample * x0_stride + place, offset, mask, EVEN)
            value = weight * (policy_v - (noise[word] - clean))
            if HAS_KL:
                value += kl_weight * (policy_v - load(kl + sample * kl_stride + place, offset, mask, EVEN))
            store(grad + sample * numel + place, offset, value, mask, EVEN)


def policy_gradient(
    grad_loss: Tensor,
    policy_v: Tensor,
    x0: Tensor,
    kl_v: Tensor | None,
    group_index: Tensor,
    seed: Tensor,
    draw: Tensor,
    weights: Tensor,
    inverse_groups: Tensor,
    kl_scale: float,
    config: TileConfig = BACKWARD_CONFIG,
) -> Tensor:
    """∂L/∂policy_v in policy_v's dtype and layout."""
    channels = layout.channels_of(policy_v)
    policy_v, x0 = layout.in_layout(policy_v, channels), layout.in_layout(x0, channels)
    kl_v = layout.in_layout(kl_v, channels) if kl_v is not None and kl_scale else None
    grad = layout.empty_like(policy_v, channels)
    samples = policy_v.shape[0]
    if samples == 0:
        return grad
    numel = policy_v[0].numel()
    itemsize = min(t.element_size() for t in (policy_v, x0, kl_v) if t is not None)
    quarter, tiles, block, vector, num_warps = config.tiles(numel, itemsize)
    with device_of(policy_v):
        _gradient_kernel[tile_grid(tiles, samples, config.span)](
            grad_loss,
            policy_v,
            x0,
            kl_v,
            group_index.contiguous(),
            seed,
            draw,
            weights,
            inverse_groups,
            grad,
            samples,
            tiles,
            numel,
            quarter,
            policy_v.stride(0),
            x0.stride(0),
            0 if kl_v is None else kl_v.stride(0),
            2.0 / numel,
            kl_scale,
            HAS_KL=kl_v is not None,
            CHANNELS=channels,
            EVEN=numel == 4 * tiles * block,
            SPAN=config.span,
            BLOCK=block,
            VECTOR=vector,
            num_warps=num_warps,
            maxnreg=config.max_registers,
            **COMPILER_OPTIONS,
        )
    return grad
