"""The DGPO loss, backward launch: the gradient in policy_v from policy_v, x0 and kl_v, each read once.

    ∂loss/∂policy_v,i = (2/N)·[w_i·(policy_v,i − v*_i) + κ·(policy_v,i − kl_v,i)],   v* = ε − x0,   κ = kl_weight/B

w_i is :mod:`dgpo_kernels.triton.group_loss`'s; ε is made again in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels import layout
from dgpo_kernels.triton.launch import BACKWARD_CONFIG, COMPILER_OPTIONS, TileConfig, device_of, tile_grid
from dgpo_kernels.triton.philox import (
    group_normals,
    load_group,
    load_words,
    no_normals,
    store,
    tile_places,
    word_mask,
    word_shift,
)


@triton.jit(do_not_specialize=["samples", "tiles", "span"])
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
    span,
    policy_stride,
    x0_stride,
    kl_stride,
    two_over_numel,
    kl_scale,
    HAS_KL: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles).to(tl.int64) * span
    counter, start, offset, lane = tile_places(tile, quarter, CHANNELS, BLOCK, VECTOR)
    seed_value = tl.load(seed)
    draw_value = tl.load(draw)
    group = tl.load(group_index + first)
    scale = tl.load(grad_loss).to(tl.float32) * two_over_numel
    kl_weight = scale * kl_scale
    scale = scale * tl.load(inverse_groups)
    noise = no_normals(BLOCK, VECTOR)
    for step in range(0, tl.minimum(span, samples - first)):
        sample = first + step
        # The sample's loads come first: memory works while the noise is made.
        rows = sample * policy_stride, sample * x0_stride, sample * kl_stride
        policy_v = load_words(policy + rows[0], tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
        clean = load_words(x0 + rows[1], tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
        kl_v = policy_v
        if HAS_KL:
            kl_v = load_words(kl + rows[2], tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
        weight = scale * tl.load(weights + sample)
        sample_group, late = load_group(group_index + sample)
        if (step == 0) | (sample_group != group):
            group = sample_group
            noise = group_normals(seed_value, draw_value, group, counter + late)
        for word in tl.static_range(4):
            place = start + word_shift(word, quarter, CHANNELS)
            mask = word_mask(word, tile, lane, numel, quarter, BLOCK)
            policy_word = policy_v[word].to(tl.float32)
            value = weight * (policy_word - (noise[word] - clean[word].to(tl.float32)))
            if HAS_KL:
                value += kl_weight * (policy_word - kl_v[word].to(tl.float32))
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
    span = config.span_of(samples, tiles, num_warps, policy_v.device)
    with device_of(policy_v):
        _gradient_kernel[tile_grid(tiles, samples, span)](
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
            span,
            policy_v.stride(0),
            x0.stride(0),
            0 if kl_v is None else kl_v.stride(0),
            2.0 / numel,
            kl_scale,
            HAS_KL=kl_v is not None,
            CHANNELS=channels,
            EVEN=numel == 4 * tiles * block,
            BLOCK=block,
            VECTOR=vector,
            num_warps=num_warps,
            maxnreg=config.max_registers,
            **COMPILER_OPTIONS,
        )
    return grad
