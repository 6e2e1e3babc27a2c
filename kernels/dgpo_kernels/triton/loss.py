"""The DGPO loss in two launches forward and one backward; neither ε nor the target velocity is ever stored.

    v* = ε − x0,   d_i = mean (v_i − v*_i)²,   kl_i = mean (policy_v,i − kl_v,i)²
    s_g = (β/G_g) Σ_{i∈g} A_i (d_policy,i − d_ref,i)
    loss = (1/P) Σ_g softplus(s_g)/β + κ Σ_i kl_i,   κ = kl_weight/B
    ∂loss/∂policy_v,i = (2/N)·[w_i·(policy_v,i − v*_i) + κ·(policy_v,i − kl_v,i)],   w_i = σ(s_g)·A_i/(P·G_g), 0 if
    clipped

``_partials_kernel`` reads every prediction once and leaves sums of squares for each (kind, sample, tile);
``_group_loss_kernel``, one program, adds them up in a fixed order and makes everything that has one value a sample;
between its two halves a caller may sum the scores over processes. ``_gradient_kernel`` reads policy_v, x0 and kl_v
and writes the gradient. There are no atomics: the same inputs give the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels import layout
from dgpo_kernels.triton.launch import (
    BACKWARD_CONFIG,
    COMPILER_OPTIONS,
    FORWARD_CONFIG,
    TileConfig,
    device_of,
    tile_grid,
)
from dgpo_kernels.triton.philox import group_normals, load, log, store, tile_places, word_mask, word_shift

# What the KL term holds the policy to: nothing, ref_v (no further read), or a tensor of its own.
KL_NONE, KL_REF, KL_OWN = 0, 1, 2

# Block sizes of the one-program kernel: samples by samples, and tiles at a time.
GROUP_BLOCKS = {"BLOCK_I": 64, "BLOCK_J": 64, "BLOCK_T": 16}
GROUP_WARPS = 8
GROUP_MAX_REGISTERS = 255


@triton.jit
def _squares(difference):
    """Sums of squares within each thread."""
    return tl.sum(difference * difference, 0)


@triton.jit(do_not_specialize=["samples", "tiles"])
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
    policy_stride,
    ref_stride,
    x0_stride,
    old_stride,
    kl_stride,
    HAS_OLD: tl.constexpr,
    KL: tl.constexpr,
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
    for step in range(0, min(SPAN, samples - first)):
        sample = first + step
        sample_group = tl.load(group_index + sample)
        if sample_group != group:
            group = sample_group
            noise = group_normals(seed_value, draw_value, group, counter)
        policy_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        ref_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        old_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        kl_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        for word in tl.static_range(4):
            place = start + word_shift(word, quarter, CHANNELS)
            mask = word_mask(word, tile, lane, numel, quarter, BLOCK)
            target = noise[word] - load(x0 + sample * x0_stride + place, offset, mask, EVEN)
            if not EVEN:
                target = tl.where(mask, target, 0.0)
            policy_v = load(policy + sample * policy_stride + place, offset, mask, EVEN)
            ref_v = load(ref + sample * ref_stride + place, offset, mask, EVEN)
            policy_sum += _squares(policy_v - target)
            ref_sum += _squares(ref_v - target)
            if HAS_OLD:
                old_v = load(old + sample * old_stride + place, offset, mask, EVEN)
                old_sum += _squares(old_v - target)
            if KL == 1:
                kl_sum += _squares(policy_v - ref_v)
            if KL == 2:
                kl_v = load(kl + sample * kl_stride + place, offset, mask, EVEN)
                kl_sum += _squares(policy_v - kl_v)
        # partials[kind, sample, tile], kinds in the order policy, ref, old, kl without those not asked for.
        place = partials + sample * tiles + tile
        kind = samples.to(tl.int64) * tiles
        tl.store(place, tl.sum(policy_sum))
        tl.store(place + kind, tl.sum(ref_sum))
        if HAS_OLD:
            tl.store(place + 2 * kind, tl.sum(old_sum))
        if KL != 0:
            tl.store(place + (2 + HAS_OLD) * kind, tl.sum(kl_sum))


@triton.jit
def _row_sums(rows, index, mask, tiles, LANES: tl.constexpr, BLOCK_T: tl.constexpr):
    """Σ over tiles of rows[index], (LANES,), in the same order every time."""
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        place = index.to(tl.int64)[:, None] * tiles + tile[None, :]
        total += tl.sum(tl.load(rows + place, mask=mask[:, None] & (tile < tiles)[None, :], other=0.0), 1)
    return total


@triton.jit(do_not_specialize=["samples", "tiles"])
def _group_loss_kernel(
    partials,
    advantage,
    group_index,
    given_scores,
    losses,
    scores,
    clipped,
    weights,
    inverse_groups,
    loss,
    samples,
    tiles,
    inverse_numel,
    beta,
    log_lower,
    log_upper,
    kl_scale,
    num_groups,
    group_size,
    HAS_OLD: tl.constexpr,
    HAS_KL: tl.constexpr,
    CLIP: tl.constexpr,
    COUNT_GROUPS: tl.constexpr,
    COUNT_SIZES: tl.constexpr,
    SCORES_GIVEN: tl.constexpr,
    SCORES_ONLY: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    kind = samples.to(tl.int64) * tiles
    groups = num_groups
    distinct = tl.zeros([BLOCK_I], tl.int32)
    loss_sum = tl.zeros([BLOCK_I], tl.float32)
    kl_sum = tl.zeros([BLOCK_I], tl.float32)
    for start_i in range(0, samples, BLOCK_I):
        i = start_i + tl.arange(0, BLOCK_I)
        mask_i = i < samples
        group_i = tl.load(group_index + i, mask=mask_i, other=0)
        score = tl.zeros([BLOCK_I], tl.float32)
        size = tl.zeros([BLOCK_I], tl.int32)
        earlier = tl.zeros([BLOCK_I], tl.int32)
        if COUNT_GROUPS or COUNT_SIZES or not SCORES_GIVEN:
            for start_j in range(0, samples, BLOCK_J):
                j = start_j + tl.arange(0, BLOCK_J)
                mask_j = j < samples
                group_j = tl.load(group_index + j, mask=mask_j, other=0)
                same = (group_i[:, None] == group_j[None, :]) & mask_i[:, None] & mask_j[None, :]
                size += tl.sum(same.to(tl.int32), 1)
                earlier += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
                if not SCORES_GIVEN:
                    policy_j = _row_sums(partials, j, mask_j, tiles, BLOCK_J, BLOCK_T)
                    ref_j = _row_sums(partials + kind, j, mask_j, tiles, BLOCK_J, BLOCK_T)
                    advantage_j = tl.load(advantage + j, mask=mask_j, other=0.0).to(tl.float32)
                    term = advantage_j * (policy_j * inverse_numel - ref_j * inverse_numel)
                    score += tl.sum(tl.where(same, term[None, :], 0.0), 1)
        divisor = group_size
        if COUNT_SIZES:
            divisor = tl.maximum(size, 1).to(tl.float32)
        score = beta / divisor * score
        if SCORES_GIVEN:
            score = tl.load(given_scores + i, mask=mask_i, other=0.0)
        tl.store(scores + i, score, mask=mask_i)
        if not SCORES_ONLY:
            distinct += (mask_i & (earlier == 0)).to(tl.int32)
            advantage_i = tl.load(advantage + i, mask=mask_i, other=0.0).to(tl.float32)
            policy_i = _row_sums(partials, i, mask_i, tiles, BLOCK_I, BLOCK_T) * inverse_numel
            ref_i = _row_sums(partials + kind, i, mask_i, tiles, BLOCK_I, BLOCK_T) * inverse_numel
            tl.store(losses + i, policy_i, mask=mask_i)
            tl.store(losses + samples + i, ref_i, mask=mask_i)
            keep = mask_i
            if HAS_OLD:
                old_i = _row_sums(partials + 2 * kind, i, mask_i, tiles, BLOCK_I, BLOCK_T) * inverse_numel
                tl.store(losses + 2 * samples + i, old_i, mask=mask_i)
                if CLIP:
                    log_ratio = old_i - policy_i
                    cut = tl.where(advantage_i > 0, log_ratio > log_upper, log_ratio < log_lower)
                    keep = keep & (cut == 0)
            if HAS_KL:
                rows = partials + (2 + HAS_OLD) * kind
                kl_i = _row_sums(rows, i, mask_i, tiles, BLOCK_I, BLOCK_T) * inverse_numel
                tl.store(losses + (2 + HAS_OLD) * samples + i, kl_i, mask=mask_i)
                kl_sum += kl_i
            tl.store(clipped + i, keep == 0, mask=mask_i)
            # σ(s) and softplus(s) = max(s, 0) + ln(1 + e^−|s|), neither of which overflows; the logarithm is corrected
            # for the rounding of 1 + e^−|s| (Kahan), so that a group far on the good side keeps its tiny loss.
            small = tl.exp(-tl.abs(score))
            rounded = 1.0 + small
            exact = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
            log1p = tl.where(rounded == 1.0, small, log(rounded) * (small / exact))
            sigmoid = tl.where(score >= 0, 1.0, small) / rounded
            softplus = tl.maximum(score, 0.0) + log1p
            loss_sum += tl.where(mask_i, softplus / (beta * divisor), 0.0)
            tl.store(weights + i, tl.where(keep, sigmoid * advantage_i / divisor, 0.0), mask=mask_i)
    if not SCORES_ONLY:
        if COUNT_GROUPS:
            groups = tl.maximum(tl.sum(distinct), 1).to(tl.float32)
        tl.store(inverse_groups, 1.0 / groups)
        tl.store(loss, tl.sum(loss_sum) / groups + kl_scale * tl.sum(kl_sum))


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
    """Sums of squared differences, float32 (kinds, B, tiles): policy, ref, and old and kl where they are given."""
    channels = layout.channels_of(policy_v)
    policy_v, ref_v, x0 = (layout.in_layout(t, channels) for t in (policy_v, ref_v, x0))
    old_v = None if old_v is None else layout.in_layout(old_v, channels)
    kl = KL_NONE if kl_v is None else KL_REF if kl_is_ref else KL_OWN
    kl_v = layout.in_layout(kl_v, channels) if kl_v is not None and kl == KL_OWN else None
    samples, numel = policy_v.shape[0], policy_v[0].numel() if policy_v.shape[0] else 1
    itemsize = min(t.element_size() for t in (policy_v, ref_v, x0, old_v, kl_v) if t is not None)
    quarter, tiles, block, vector, num_warps = config.tiles(numel, itemsize)
    kinds = 2 + (old_v is not None) + (kl != KL_NONE)
    partials = torch.empty((kinds, samples, tiles), dtype=torch.float32, device=policy_v.device)
    if samples == 0:
        return partials
    with device_of(policy_v):
        _partials_kernel[tile_grid(tiles, samples, config.span)](
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
            policy_v.stride(0),
            ref_v.stride(0),
            x0.stride(0),
            0 if old_v is None else old_v.stride(0),
            0 if kl_v is None else kl_v.stride(0),
            HAS_OLD=old_v is not None,
            KL=kl,
            CHANNELS=channels,
            EVEN=numel == 4 * tiles * block,
            SPAN=config.span,
            BLOCK=block,
            VECTOR=vector,
            num_warps=num_warps,
            maxnreg=config.max_registers,
            **COMPILER_OPTIONS,
        )
    return partials


def group_loss(
    partials: Tensor,
    numel: int,
    advantage: Tensor,
    group_index: Tensor,
    given_scores: Tensor | None,
    has_old: bool,
    has_kl: bool,
    beta: float,
    clip_range: float | None,
    kl_scale: float,
    num_groups: int | None,
    group_size: int | None,
    scores_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), losses (kinds, B), scores (B,), clipped (B,), weights (B,) without their 1/P, 1/P ()) from the sums.

    With ``scores_only`` the scores alone are written.
    """
    kinds, samples, tiles = partials.shape
    device = partials.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    loss, inverse_groups = empty(), empty()
    losses, scores, weights = empty(kinds, samples), empty(samples), empty(samples)
    clipped = empty(samples, dtype=torch.bool)
    clip = 0.0 if clip_range is None else clip_range
    log_lower, log_upper = math.log1p(-clip) if clip < 1 else -math.inf, math.log1p(clip)
    with device_of(partials):
        _group_loss_kernel[(1,)](
            partials,
            advantage.contiguous(),
            group_index.contiguous(),
            None if given_scores is None else given_scores.contiguous(),
            losses,
            scores,
            clipped,
            weights,
            inverse_groups,
            loss,
            samples,
            tiles,
            1.0 / numel,
            beta,
            log_lower,
            log_upper,
            kl_scale,
            float(num_groups or 0),
            float(group_size or 0),
            HAS_OLD=has_old,
            HAS_KL=has_kl,
            CLIP=clip_range is not None,
            COUNT_GROUPS=num_groups is None and not scores_only,
            COUNT_SIZES=group_size is None,
            SCORES_GIVEN=given_scores is not None,
            SCORES_ONLY=scores_only,
            **GROUP_BLOCKS,
            num_warps=GROUP_WARPS,
            maxnreg=GROUP_MAX_REGISTERS,
            **COMPILER_OPTIONS,
        )
    return loss, losses, scores, clipped, weights, inverse_groups


def group_scores(
    partials: Tensor, numel: int, advantage: Tensor, group_index: Tensor, beta: float, group_size: int | None
) -> Tensor:
    """This call's part of each sample's group score (B,)."""
    results = group_loss(
        partials, numel, advantage, group_index, None, False, False, beta, None, 0.0, None, group_size, scores_only=True
    )
    return results[2]


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
