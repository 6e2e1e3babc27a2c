"""The DGPO loss, second launch: from the sums of squares to everything that has one value a sample.

    s_g = (β/G_g) Σ_{i∈g} A_i (d_policy,i − d_ref,i)
    loss = (1/P) Σ_g softplus(s_g)/β + κ Σ_i kl_i,   κ = kl_weight/B
    w_i = σ(s_g)·A_i/(P·G_g), 0 if clipped: the gradient of the loss in d_policy,i

One program adds the sums of :mod:`dgpo_kernels.triton.loss_partials` up in a fixed order, so that the same inputs give
the same bits. Between the scores and the loss a caller may sum the scores over processes: the kernel then runs twice.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels.triton.launch import COMPILER_OPTIONS, device_of
from dgpo_kernels.triton.philox import log

# Block sizes of the one-program kernel: samples by samples, and tiles at a time.
GROUP_BLOCKS = {"BLOCK_I": 64, "BLOCK_J": 64, "BLOCK_T": 16}
GROUP_WARPS = 8
GROUP_MAX_REGISTERS = 255


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
