"""The ops written plainly in PyTorch: what every other implementation is tested against, and what runs without a GPU.

Everything here is made of differentiable, traceable tensor operations, needs no host synchronisation on a GPU, and
computes in float32, or in float64 if an input is float64.

Noise. Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a pure function from a
128-bit counter and a 64-bit key to four 32-bit words. Here

    key     = (seed's low word, seed's high word)
    counter = (i, group's low word, group's high word, draw),     i = 0 … Q − 1,  Q = ⌈N / 4⌉

and the four words of counter i become the noise of elements i, Q + i, 2Q + i and 3Q + i of a sample of N elements:
the four quarters of the sample, each contiguous, so that a kernel reads and writes whole vectors without shuffling
its lanes. This leaves 2³⁴ elements a sample, 2⁶⁴ groups and 2³² draws a seed, with no hashing and hence no collisions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 0xFFFFFFFF
# Philox's round multipliers less 2³², so that a product with a 32-bit word stays inside int64.
MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class SampleLosses(NamedTuple):
    """Per-sample losses (B,): means over a sample's elements; None if the prediction was not given."""

    policy: Tensor
    ref: Tensor
    old: Tensor | None
    kl: Tensor | None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four int64 tensors of 32-bit counter words and two of key words to four of random words."""

    def multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
        product = word * multiplier
        return ((product >> 32) + word) & WORD, product & WORD

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = multiply(c0, MULTIPLIERS[0])
        high1, low1 = multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def box_muller(word_u: Tensor, word_v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two random words (int64), by the Box–Muller transform.

    u = (word_u + ½)·2⁻³² in float32, in (0, 1]; θ in [−π/4, π/4) from the low 30 bits of word_v, and a sign from each
    of its two high bits: (±√(−ln u)·(cos θ − sin θ), ±√(−ln u)·(cos θ + sin θ)). The quadrant's points lie at θ +
    π/4, which turns the usual √2 into these sums. u and θ are float32 numbers by definition, so that every device has
    the very same ones.
    """
    u = (word_u.to(torch.float32) * 2.0**-32 + 2.0**-33).to(dtype)
    theta = ((word_v & 0x3FFFFFFF) - (1 << 29)).to(torch.float32).to(dtype) * (math.pi * 2.0**-31)
    radius, cosine, sine = (-torch.log(u)).sqrt(), theta.cos(), theta.sin()
    first = radius * (cosine - sine)
    second = radius * (cosine + sine)
    return torch.where((word_v >> 31) != 0, -first, first), torch.where(((word_v >> 30) & 1) != 0, -second, second)


def philox_normal(
    shape: tuple[int, ...], group_index: Tensor, seed: Tensor, draw: Tensor, dtype: torch.dtype
) -> Tensor:
    """Standard normal noise (B, *shape): row b depends on (seed, draw, group_index[b]) alone."""
    if group_index.device.type == "cpu" and not torch.compiler.is_compiling() and group_index.numel() > 1:
        # A group's row is made once and copied. On a GPU this would wait for the number of groups.
        groups, inverse = torch.unique(group_index, return_inverse=True)
        if len(groups) < len(group_index):
            return philox_normal(shape, groups, seed, draw, dtype)[inverse]
    numel = math.prod(shape)
    # Masked, though it is below 2³² anyway: the compiler would take its products for addresses, and overflow them.
    element = torch.arange((numel + 3) // 4, device=group_index.device)[None] & WORD
    group = group_index[:, None]
    counter = (element, group & WORD, (group >> 32) & WORD, draw & WORD)
    w0, w1, w2, w3 = philox_4x32(counter, (seed & WORD, (seed >> 32) & WORD))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    quarters = torch.cat([*box_muller(w0, w1, compute), *box_muller(w2, w3, compute)], dim=1)
    return quarters[:, :numel].reshape(group_index.shape[0], *shape).to(dtype)


def group_noise(x0: Tensor, sigma: Tensor, group_index: Tensor, seed: Tensor, draw: Tensor) -> Tensor:
    """x_t = (1 − σ)·x0 + σ·ε, with one ε per group, rounded once to x0's dtype."""
    dtype = compute_dtype(x0)
    noise = philox_normal(tuple(x0.shape[1:]), group_index, seed, draw, dtype)
    sigma = sigma.to(dtype).reshape(-1, *[1] * (x0.dim() - 1))
    return ((1 - sigma) * x0.to(dtype) + sigma * noise).to(x0.dtype)


def sample_losses(
    policy_v: Tensor,
    ref_v: Tensor,
    x0: Tensor,
    group_index: Tensor,
    seed: Tensor,
    draw: Tensor,
    old_v: Tensor | None,
    kl_v: Tensor | None,
) -> SampleLosses:
    """d_v = mean (v − v*)² for policy, reference and old with v* = ε − x0, and kl = mean (v_policy − v_kl)²."""
    dtype = compute_dtype(policy_v, ref_v, x0, old_v, kl_v)
    target = philox_normal(tuple(x0.shape[1:]), group_index, seed, draw, dtype) - x0.to(dtype)

    def mean_square(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) - b.to(dtype)).square().flatten(1).mean(1)

    return SampleLosses(
        policy=mean_square(policy_v, target),
        ref=mean_square(ref_v, target),
        old=None if old_v is None else mean_square(old_v, target),
        kl=None if kl_v is None else mean_square(policy_v, kl_v),
    )


def same_group(group_index: Tensor) -> Tensor:
    """(B, B) bool: whether two samples share a group. Of small B, it costs less than a sort."""
    return group_index[:, None] == group_index[None, :]


def group_scores(
    losses: SampleLosses, advantage: Tensor, group_index: Tensor, beta: float, group_size: int | None
) -> Tensor:
    """s_g = (β / G_g) Σ_{i∈g} A_i (d_policy,i − d_ref,i) over the samples of the call, for each sample of g (B,)."""
    same = same_group(group_index)
    size = same.sum(1).to(losses.policy.dtype) if group_size is None else group_size
    term = advantage.to(losses.policy.dtype) * (losses.policy - losses.ref).detach()
    return beta / size * torch.where(same, term[None, :], 0).sum(1)


def loss_from_scores(
    losses: SampleLosses,
    score: Tensor,
    advantage: Tensor,
    group_index: Tensor,
    beta: float,
    clip_range: float | None,
    kl_weight: float,
    num_groups: int | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    """loss = (1/P) Σ_g softplus(s_g)/β + (kl_weight/B) Σ_i kl_i, and which samples were clipped (B,).

    Each sample of a group carries 1/G_g of its group's softplus, so that calls which hold parts of a group add up to
    the whole. The gradient takes s_g as known and lets each sample's own A_i·d_i carry it: ∂loss/∂d_i = σ(s_g)·A_i /
    (P·G_g), which for a whole group is the derivative of the value.
    """
    same = same_group(group_index)
    size = same.sum(1).to(losses.policy.dtype) if group_size is None else group_size
    groups = (~same.tril(-1).any(1)).sum().clamp(min=1) if num_groups is None else num_groups
    advantage = advantage.to(losses.policy.dtype)
    clipped = torch.zeros_like(advantage, dtype=torch.bool)
    if clip_range is not None and losses.old is not None:
        lower, upper = log_clip_bounds(clip_range)
        log_ratio = (losses.old - losses.policy).detach()
        clipped = torch.where(advantage > 0, log_ratio > upper, log_ratio < lower)
    own = beta * advantage * torch.where(clipped, losses.policy.detach(), losses.policy)
    softplus = -F.logsigmoid(-(score + (own - own.detach())))
    loss = (softplus / (beta * size * groups)).sum()
    if losses.kl is not None and kl_weight != 0:
        batch = num_groups * group_size if num_groups and group_size else max(group_index.shape[0], 1)
        loss = loss + kl_weight / batch * losses.kl.sum()
    return loss, clipped


def log_clip_bounds(clip_range: float) -> tuple[float, float]:
    """ln(1 − c), ln(1 + c): log-ratios are compared, since exp(d_old − d_policy) can overflow."""
    return (math.log1p(-clip_range) if clip_range < 1 else -math.inf), math.log1p(clip_range)


def dgpo_loss(
    policy_v: Tensor,
    ref_v: Tensor,
    x0: Tensor,
    advantage: Tensor,
    group_index: Tensor,
    seed: Tensor,
    draw: Tensor,
    beta: float,
    old_v: Tensor | None = None,
    clip_range: float | None = None,
    kl_v: Tensor | None = None,
    kl_weight: float = 0.0,
    num_groups: int | None = None,
    group_size: int | None = None,
    reduce_group_scores: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, SampleLosses, Tensor, Tensor]:
    """The DGPO loss (arXiv 2510.08425, Eq. 17, over β): loss, per-sample losses, clipped (B,), group score (B,)."""
    losses = sample_losses(policy_v, ref_v, x0, group_index, seed, draw, old_v, kl_v)
    score = group_scores(losses, advantage, group_index, beta, group_size)
    if reduce_group_scores is not None:
        score = reduce_group_scores(score)
    loss, clipped = loss_from_scores(
        losses, score, advantage, group_index, beta, clip_range, kl_weight, num_groups, group_size
    )
    return loss, losses, clipped, score


def guided_velocity(v_cond: Tensor, v_uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """Classifier-free guidance: v = v_uncond + g·(v_cond − v_uncond), or v_cond if v_uncond is None."""
    if v_uncond is None:
        return v_cond.to(dtype)
    return v_uncond.to(dtype) + guidance_scale * (v_cond.to(dtype) - v_uncond.to(dtype))


def guided_euler_step(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance_scale: float, coefficients: Tensor
) -> Tensor:
    """x_next = x + Δσ·v with v guided and coefficients = [Δσ]."""
    dtype = compute_dtype(x)
    return x + coefficients.to(dtype)[0] * guided_velocity(v_cond, v_uncond, guidance_scale, dtype)


def guided_dpmpp_2m_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    x0_prev: Tensor | None,
    guidance_scale: float,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """x0 = x − σ·v with v guided; x_next = a·x + b·x0 + c·x0_prev, coefficients = [σ, a, b, c] (DPM-Solver++(2M))."""
    dtype = compute_dtype(x)
    sigma, a, b, c = coefficients.to(dtype).unbind()
    x0 = x - sigma * guided_velocity(v_cond, v_uncond, guidance_scale, dtype)
    x_next = a * x + b * x0
    if x0_prev is not None:
        x_next = x_next + c * x0_prev
    return x_next, x0
