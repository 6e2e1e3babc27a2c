"""The DGPO loss, second launch: from the sums of squares to everything that has one value a sample.

    s_g = (β/G_g) Σ_{i∈g} A_i (d_policy,i − d_ref,i)
    loss = (1/P) Σ_g softplus(s_g)/β + κ Σ_i kl_i,   κ = kl_weight/B
    w_i = σ(s_g)·A_i/(P·G_g), 0 if clipped: the gradient of the loss in d_policy,i

One program does it in two steps, in a fixed order, so that the same inputs give the same bits. First it adds the sums
of :mod:`dgpo_kernels.triton.loss_partials` up, each row once; after a barrier, each thread compares one sample's group
with all others' and adds up scalars. Between the scores and the loss a caller may sum the scores over processes: the
kernel then runs twice.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels.triton.launch import COMPILER_OPTIONS, device_of
from dgpo_kernels.triton.philox import log

# Block sizes of the one-program kernel: rows and tiles at a time; samples, one to a thread, by samples at a time.
GROUP_BLOCKS = {"BLOCK_ROWS": 256, "BLOCK_T": 16, "BLOCK_I": 256, "BLOCK_J": 16}
GROUP_WARPS = 8
GROUP_MAX_REGISTERS = 255


@triton.jit
def _add_rows(rows, sums, count, tiles, scale, BLOCK_ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """sums[r] = scale · Σ over tiles of rows[r], for `count` rows, in the same order every time."""
    for start_row in range(0, count, BLOCK_ROWS):
        row = start_row + tl.arange(0, BLOCK_ROWS)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            place = row.to(tl.int64)[:, None] * tiles + tile[None, :]
            total += tl.sum(tl.load(rows + place, mask=(row < count)[:, None] & (tile < tiles)[None, :], other=0.0), 1)
        tl.store(sums + row, total * scale, mask=row < count)
    # What other threads have stored is read from here on.
    tl.debug_barrier()


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    kinds = 2 if SCORES_ONLY else 2 + HAS_OLD + HAS_KL
    _add_rows(partials, losses, kinds * samples, tiles, inverse_numel, BLOCK_ROWS, BLOCK_T)
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
                # Down a column, which a thread holds: sums over j need no other thread.
                j = start_j + tl.arange(0, BLOCK_J)[:, None]
                mask_j = j < samples
                same = (tl.load(group_index + j, mask=mask_j, other=0) == group_i[None, :]) & mask_j
                if COUNT_SIZES:
                    size += tl.sum(same.to(tl.int32), 0)
                if COUNT_GROUPS:
                    earlier += tl.sum((same & (j < i[None, :])).to(tl.int32), 0)
                if not SCORES_GIVEN:
                    policy_j = tl.load(losses + j, mask=mask_j, other=0.0)
                    ref_j = tl.load(losses + samples + j, mask=mask_j, other=0.0)
                    term = tl.load(advantage + j, mask=mask_j, other=0.0).to(tl.float32) * (policy_j - ref_j)
                    score += tl.sum(tl.where(same, term, 0.0), 0)
        divisor = group_size
        if COUNT_SIZES:
            divisor = tl.maximum(size, 1).to(tl.float32)
        score = beta / divisor * score
        if SCORES_GIVEN:
            score = tl.load(given_scores + i, mask=mask_i, other=0.0)
        tl.store(scores + i, score, mask=mask_i)
        if not SCORES_ONLY:
            if COUNT_GROUPS:
                distinct += (mask_i & (earlier == 0)).to(tl.int32)
            advantage_i = tl.load(advantage + i, mask=mask_i, other=0.0).to(tl.float32)
            keep = mask_i
            if CLIP:
                policy_i = tl.load(losses + i, mask=mask_i, other=0.0)
                log_ratio = tl.load(losses + 2 * samples + i, mask=mask_i, other=0.0) - policy_i
                cut = tl.where(advantage_i > 0, log_ratio > log_upper, log_ratio < log_lower)
                keep = keep & (cut == 0)
            if HAS_KL:
                kl_sum += tl.load(losses + (2 + HAS_OLD) * samples + i, mask=mask_i, other=0.0)
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
            CLIP=clip_range is not None and has_old,
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
