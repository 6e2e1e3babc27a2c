"""The DGPO loss, first launch: sums of squares of every prediction's error, each prediction read once.

    v* = ε − x0,   d_i = mean (v_i − v*_i)²,   kl_i = mean (policy_v,i − kl_v,i)²

Neither ε nor the target velocity v* is ever stored: ε is made in registers, once for each run of equal groups. What is
written is one float a (kind, sample, tile), in the order policy, ref, old, kl; :mod:`dgpo_kernels.triton.group_loss`
adds the tiles up. There are no atomics: the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels import layout
from dgpo_kernels.triton.launch import COMPILER_OPTIONS, FORWARD_CONFIG, TileConfig, device_of, tile_grid
from dgpo_kernels.triton.philox import group_normals, load_group, load_words, no_normals, tile_places, word_mask

# What the KL term holds the policy to: nothing, ref_v (no further read), or a tensor of its own.
KL_NONE, KL_REF, KL_OWN = 0, 1, 2


@triton.jit
def _add_squares(total, difference):
    return tl.fma(difference, difference, total)


@triton.jit(do_not_specialize=["samples", "tiles", "span"])
def _partials_kernel(
    policy,
    ref,
    x0,
    old,
    kl,
    group_index,
    seed,
    draw,
    partials,
    samples,
    tiles,
    numel,
    quarter,
    span,
    policy_stride,
    ref_stride,
    x0_stride,
    old_stride,
    kl_stride,
    HAS_OLD: tl.constexpr,
    KL: tl.constexpr,
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
    noise = no_normals(BLOCK, VECTOR)
    for step in range(0, tl.minimum(span, samples - first)):
        sample = first + step
        # The sample's loads come first: memory works while the noise is made.
        clean = load_words(x0 + sample * x0_stride, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
        policy_v = load_words(
            policy + sample * policy_stride, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK
        )
        ref_v = load_words(ref + sample * ref_stride, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
        old_v = policy_v
        if HAS_OLD:
            old_v = load_words(
                old + sample * old_stride, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK
            )
        kl_v = ref_v
        if KL == 2:
            kl_v = load_words(kl + sample * kl_stride, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
        sample_group, late = load_group(group_index + sample)
        if (step == 0) | (sample_group != group):
            group = sample_group
            noise = group_normals(seed_value, draw_value, group, counter + late)
        # One fused multiply-add for each element; lanes of a thread are added up once, behind the last word.
        policy_sum = tl.zeros([VECTOR, BLOCK // VECTOR], tl.float32)
        ref_sum = tl.zeros([VECTOR, BLOCK // VECTOR], tl.float32)
        old_sum = tl.zeros([VECTOR, BLOCK // VECTOR], tl.float32)
        kl_sum = tl.zeros([VECTOR, BLOCK // VECTOR], tl.float32)
        for word in tl.static_range(4):
            target = noise[word] - clean[word].to(tl.float32)
            if not EVEN:
                target = tl.where(word_mask(word, tile, lane, numel, quarter, BLOCK), target, 0.0)
            policy_word = policy_v[word].to(tl.float32)
            policy_sum = _add_squares(policy_sum, policy_word - target)
            ref_sum = _add_squares(ref_sum, ref_v[word].to(tl.float32) - target)
            if HAS_OLD:
                old_sum = _add_squares(old_sum, old_v[word].to(tl.float32) - target)
            if KL != 0:
                kl_sum = _add_squares(kl_sum, policy_word - kl_v[word].to(tl.float32))
        # partials[kind, sample, tile], kinds in the order policy, ref, old, kl without those not asked for.
        place = partials + sample * tiles + tile
        kind = samples.to(tl.int64) * tiles
        tl.store(place, tl.sum(policy_sum))
        tl.store(place + kind, tl.sum(ref_sum))
        if HAS_OLD:
            tl.store(place + 2 * kind, tl.sum(old_sum))
        if KL != 0:
            tl.store(place + (2 + HAS_OLD) * kind, tl.sum(kl_sum))


def loss_partials(
    policy_v: Tensor,
    ref_v: Tensor,
    x0: Tensor,
    old_v: Tensor | None,
    kl_v: Tensor | None,
    kl_is_ref: bool,
    group_index: Tensor,
    seed: Tensor,
    draw: Tensor,
    config: TileConfig = FORWARD_CONFIG,
) -> Tensor:
    """Sums of squared differences, float32 (kinds, B, tiles): policy, ref, and old and kl if they are given."""
    channels = layout.channels_of(policy_v)
    policy_v, ref_v, x0 = (layout.in_layout(t, channels) for t in (policy_v, ref_v, x0))
    old_v = None if old_v is None else layout.in_layout(old_v, channels)
    kl = KL_NONE if kl_v is None else KL_REF if kl_is_ref else KL_OWN
    kl_v = layout.in_layout(kl_v, channels) if kl_v is not None and kl == KL_OWN else None
    samples, numel = policy_v.shape[0], policy_v[0].numel() if policy_v.shape[0] else 1
    itemsize = min(t.element_size() for t in (policy_v, ref_v, x0, old_v, kl_v) if t is not None)
    quarter, tiles, block, vector, num_warps = config.tiles(numel, itemsize)
    span = config.span_of(samples, tiles, num_warps, policy_v.device)
    kinds = 2 + (old_v is not None) + (kl != KL_NONE)
    partials = torch.empty((kinds, samples, tiles), dtype=torch.float32, device=policy_v.device)
    if samples == 0:
        return partials
    with device_of(policy_v):
        _partials_kernel[tile_grid(tiles, samples, span)](
            policy_v,
            ref_v,
            x0,
            old_v,
            kl_v,
            group_index.contiguous(),
            seed,
            draw,
            partials,
            samples,
            tiles,
            numel,
            quarter,
            span,
            policy_v.stride(0),
            ref_v.stride(0),
            x0.stride(0),
            0 if old_v is None else old_v.stride(0),
            0 if kl_v is None else kl_v.stride(0),
            HAS_OLD=old_v is not None,
            KL=kl,
            CHANNELS=channels,
            EVEN=numel == 4 * tiles * block,
            BLOCK=block,
            VECTOR=vector,
            num_warps=num_warps,
            maxnreg=config.max_registers,
            **COMPILER_OPTIONS,
        )
    return partials
