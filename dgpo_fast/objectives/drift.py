"""How far the policy's velocities have moved from the base model's, and a regulariser of their norm.

At each noise level, with a sample's velocity v, the base's v_base for the same input, and v_ref, which a KL term
holds v to,

    norm ratio = ‖v‖ / ‖v_ref‖        distance = mean (v − v_base)²        hinge = max(0, norm ratio − 1)²

v_ref is v_base, or has guidance if a KL term distils that into the policy: guidance lengthens velocities by itself.
A norm that grows is an early sign of reward hacking. The hinge is after NormGuard (arXiv 2606.27771), whose abstract
says that it is active only where ‖v‖ > ‖v_ref‖; that it is squared and relative, and that the norm is over all
elements of the latent, is inferred.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dgpo_fast.models.forward import wide
from dgpo_fast.records import Metrics

DRIFT = "drift"
"""The name under which objectives return `drift_sums`; `with_drift` makes means of them."""
LEVELS = 4
"""Noise levels are told apart by equal parts of σ in [0, 1], of which there are this many."""


def mean_square(difference: Tensor) -> Tensor:
    """(B,): the mean of each sample's squares."""
    return difference.square().flatten(1).mean(1)


def norm_ratio(policy_v: Tensor, ref_v: Tensor) -> Tensor:
    """‖v‖ / ‖v_ref‖ of each sample, (B,), from (B, C, H, W) each; differentiable in `policy_v`."""
    policy_norm, ref_norm = (wide(velocity).flatten(1).norm(dim=1) for velocity in (policy_v, ref_v))
    return policy_norm / ref_norm.clamp(min=torch.finfo(ref_norm.dtype).tiny)


def norm_hinge(policy_v: Tensor, ref_v: Tensor) -> Tensor:
    """max(0, ‖v‖/‖v_ref‖ − 1)² of each sample, (B,); differentiable in `policy_v`, also where the ratio is 1."""
    return (norm_ratio(policy_v, ref_v) - 1).clamp(min=0).square()


def drift_sums(policy_v: Tensor, base_v: Tensor, ref_v: Tensor, sigma: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums of 1, norm ratio and distance over samples, for each part of σ: (LEVELS, 3), without a gradient.

    Args:
        policy_v, base_v, ref_v: (B, C, H, W).
        sigma: () or (B,).
        weight: (B,), 0 for padding; None: all samples count.
    """
    policy_v, base_v = wide(policy_v.detach()), wide(base_v)
    distance = mean_square(policy_v - base_v)
    values = torch.stack([torch.ones_like(distance), norm_ratio(policy_v, ref_v), distance], dim=1)
    part = (sigma.expand(len(distance)) * LEVELS).long().clamp(max=LEVELS - 1)
    inside = (part[:, None] == torch.arange(LEVELS, device=part.device)).to(values.dtype)
    inside = inside if weight is None else inside * weight[:, None]
    return (inside[:, :, None] * values[:, None]).sum(0)  # no matrix product, which FLOP counters would count


def drift_terms(
    policy_v: Tensor,
    base_v: Tensor,
    ref_v: Tensor,
    sigma: Tensor,
    *,
    samples: int,
    hinge: bool,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Parts of means over `samples` samples: `drift_sums`, and `norm_hinge`, which has a gradient, if it is wanted."""
    found = {DRIFT: drift_sums(policy_v, base_v, ref_v, sigma, weight) / samples}
    if hinge:
        each = norm_hinge(policy_v, ref_v)
        found["norm_hinge"] = (each if weight is None else each * weight).sum() / samples
    return found


def as_numbers(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """What objectives returned, as numbers that processes can add up: those of `drift_sums` under names of their
    own, which `with_drift` reads."""
    sums = {name: value.flatten().tolist() for name, value in totals.items() if name == DRIFT}
    numbers = {name: float(value) for name, value in totals.items() if name != DRIFT}
    return numbers | {f"{DRIFT}/{index}": value for index, value in enumerate(sums.get(DRIFT, []))}


def with_drift(numbers: Mapping[str, float]) -> Metrics:
    """`numbers` with means of norm ratio and distance in place of their sums: over all samples, and over those of each
    part of σ that has some."""
    metrics: Metrics = {name: value for name, value in numbers.items() if not name.startswith(f"{DRIFT}/")}
    flat = [value for name, value in numbers.items() if name.startswith(f"{DRIFT}/")]
    rows = [flat[start : start + 3] for start in range(0, len(flat), 3)]
    named = {f"/sigma_{part / LEVELS:g}_{(part + 1) / LEVELS:g}": row for part, row in enumerate(rows)}
    everything = {"": [sum(column) for column in zip(*rows, strict=True)]} if rows else {}
    for suffix, (count, ratio, distance) in {**everything, **named}.items():
        if count > 0:
            metrics |= {f"norm_ratio{suffix}": ratio / count, f"base_distance{suffix}": distance / count}
    return metrics
