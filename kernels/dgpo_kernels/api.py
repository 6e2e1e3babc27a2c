"""The public ops: arguments are checked, an implementation is chosen explicitly, and nothing falls back in silence.

Shapes: B samples; N elements in a sample; P groups. ``impl`` is one of

* ``"eager"``: plain PyTorch, any device, any float dtype;
* ``"compile"``: ``torch.compile`` of the same functions;
* ``"triton"``: the fused kernels, on CUDA tensors of float32, bfloat16 or float16;
* ``"auto"``: ``"triton"`` if it can run, else ``"eager"``; the choice is logged once for each op and device.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgpo_kernels import checks, ops, reference
from dgpo_kernels.dispatch import function, resolve


class DGPOLoss(NamedTuple):
    """What :func:`dgpo_loss` returns. All but ``loss`` are detached; per-sample tensors are float32 (B,).

    loss: 0-dim, differentiable in ``policy_v``.
    dsm_policy, dsm_ref, dsm_old: denoising losses mean (v − v*)²; ``dsm_old`` is None without ``old_v``.
    kl: mean (policy_v − kl_v)²; None without ``kl_v``.
    clipped: bool (B,), True if the sample's gradient was cut.
    group_score: s_g of each sample's group, after ``reduce_group_scores``. One value a sample, not one a group: so its
        shape is known without waiting for the device.
    """

    loss: Tensor
    dsm_policy: Tensor
    dsm_ref: Tensor
    dsm_old: Tensor | None
    kl: Tensor | None
    clipped: Tensor
    group_score: Tensor


class LossInputs(NamedTuple):
    """What :func:`dgpo_loss` takes a sample's losses from, in the order of ``reference.sample_losses``."""

    policy_v: Tensor
    ref_v: Tensor
    x0: Tensor
    group_index: Tensor
    seed: Tensor
    draw: Tensor
    old_v: Tensor | None
    kl_v: Tensor | None


class LossOptions(NamedTuple):
    """How :func:`dgpo_loss` weights them, in the order of ``reference.loss_from_scores``."""

    beta: float
    clip_range: float | None
    kl_weight: float
    num_groups: int | None
    group_size: int | None


def philox_normal(
    shape: Sequence[int],
    group_index: Tensor,
    *,
    seed: int | Tensor,
    draw: int | Tensor,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Standard normal noise that is a pure function of (seed, draw, group): (B, \\*shape), equal rows for equal groups.

    The generator is counter-based Philox-4x32-10 (:mod:`dgpo_kernels.reference` gives the layout), so that any
    process that holds any part of a group draws the same noise, in any order, and a resumed run draws what an
    uninterrupted one would.

    Args:
        shape: of one sample; at most 2³⁴ elements.
        group_index: int64 (B,), any 64-bit ids.
        seed: 64 bits; a Python int or a 0-dim int64 tensor on ``device``.
        draw: number of the draw, 0 ≤ draw < 2³²; a Python int, or a 0-dim int64 tensor on ``device`` (taken modulo
            2³²).
        device: of the result; ``group_index``'s by default.
        dtype: of the result; computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    shape = tuple(shape)
    device = group_index.device if device is None else torch.device(device)
    group_index = group_index.to(device)
    checks.check_group_index(group_index)
    checks.check_sample_size(math.prod(shape), "shape")
    if dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected one of {checks.dtype_names(checks.FLOAT_DTYPES)}, got {dtype}")
    impl = resolve(impl, "philox_normal", device, (dtype,))
    seed, draw = checks.seed_tensor(seed, device), checks.draw_tensor(draw, device)
    with torch.no_grad():
        return function("philox_normal", impl)(shape, group_index, seed, draw, dtype)


def group_noise(
    x0: Tensor, sigma: Tensor, group_index: Tensor, *, seed: int | Tensor, draw: int | Tensor, impl: str = "auto"
) -> Tensor:
    """x_t = (1 − σ)·x0 + σ·ε with one ε per group: the rectified-flow forward process (Liu et al., 2023, Eq. 1).

    ε is :func:`philox_normal`'s for the same (seed, draw, group) and is never stored. Not differentiable: x_t is data.

    Args:
        x0: clean latents (B, …), float.
        sigma: noise levels in [0, 1], float (B,) or ().
        group_index: int64 (B,).
        seed, draw: as for :func:`philox_normal`, tensors on x0's device.

    Returns:
        x_t in x0's shape and dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    checks.check_samples(x0, "x0")
    checks.check_float(sigma, "sigma")
    if sigma.shape not in ((), (x0.shape[0],)):
        raise ValueError(f"sigma: expected shape () or ({x0.shape[0]},), got {tuple(sigma.shape)}")
    checks.check_group_index(group_index, x0)
    checks.check_device(sigma, "sigma", x0)
    impl = resolve(impl, "group_noise", x0.device, (x0.dtype,))
    seed, draw = checks.seed_tensor(seed, x0.device), checks.draw_tensor(draw, x0.device)
    with torch.no_grad():
        return function("group_noise", impl)(x0, sigma, group_index, seed, draw)


def dgpo_loss(
    policy_v: Tensor,
    ref_v: Tensor,
    x0: Tensor,
    advantage: Tensor,
    group_index: Tensor,
    *,
    seed: int | Tensor,
    draw: int | Tensor,
    beta: float,
    old_v: Tensor | None = None,
    clip_range: float | None = None,
    kl_v: Tensor | None = None,
    kl_weight: float = 0.0,
    num_groups: int | None = None,
    group_size: int | None = None,
    reduce_group_scores: Callable[[Tensor], Tensor] | None = None,
    impl: str = "auto",
) -> DGPOLoss:
    """The DGPO loss of one (micro-batch, timestep): Eq. 17 of arXiv 2510.08425, divided by β.

        v* = ε − x0,   d_i = mean (v_i − v*_i)²
        s_g = (β / G_g) Σ_{i∈g} A_i (d_policy,i − d_ref,i)
        loss = (1/P) Σ_g softplus(s_g)/β + (kl_weight / B) Σ_i mean (policy_v,i − kl_v,i)²

    ε is that of :func:`group_noise` for the same (seed, draw, group). The gradient of a sample's d_policy is
    σ(s_g)·A_i / (P·G_g). With ``clip_range`` c, a sample with A > 0 and exp(d_old − d_policy) > 1 + c, or A ≤ 0 and
    exp(d_old − d_policy) < 1 − c, gets no gradient through d_policy; its value still counts in s_g, and its KL term
    stays.

    Groups that are spread over calls or processes: give ``group_size`` and ``num_groups`` of the whole and a
    ``reduce_group_scores``. A group's softplus is then weighted by the fraction of its samples in this call, so that
    values and gradients add up over the calls to those of the whole.

    Args:
        policy_v, ref_v, x0: (B, …) of one shape; float dtypes may differ. Gradients flow to ``policy_v`` alone.
        advantage: float (B,).
        group_index: int64 (B,), any ids in any order.
        seed, draw: as for :func:`philox_normal`, tensors on x0's device.
        beta: β > 0.
        old_v: the behaviour policy's prediction, needed by ``clip_range``.
        clip_range: c > 0, or None for no clipping.
        kl_v: the prediction that the KL term holds the policy to; may be ``ref_v`` itself.
        kl_weight: ≥ 0; needs ``kl_v`` unless 0. Its divisor B is num_groups·group_size if both are given, else the
            call's.
        num_groups: P; the number of distinct groups in the call by default.
        group_size: G of every group; each group's number of samples in the call by default.
        reduce_group_scores: called with this call's part of each sample's group score (B,), returns the whole score
            (B,): a sum over processes, or the scores of an earlier pass. Treated as a constant by the gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    checks.check_samples(policy_v, "policy_v")
    predictions = {"ref_v": ref_v, "x0": x0, "old_v": old_v, "kl_v": kl_v}
    for name, tensor in predictions.items():
        if tensor is not None:
            checks.check_like(tensor, name, policy_v, "policy_v")
    checks.check_float(advantage, "advantage")
    if advantage.shape != (policy_v.shape[0],):
        raise ValueError(f"advantage: expected shape ({policy_v.shape[0]},), got {tuple(advantage.shape)}")
    checks.check_device(advantage, "advantage", policy_v)
    checks.check_group_index(group_index, policy_v)
    checks.check_loss_options(beta, old_v, clip_range, kl_v, kl_weight, num_groups, group_size)
    dtypes = tuple(t.dtype for t in (policy_v, *predictions.values()) if t is not None)
    impl = resolve(impl, "dgpo_loss", policy_v.device, dtypes)
    seed, draw = checks.seed_tensor(seed, policy_v.device), checks.draw_tensor(draw, policy_v.device)
    inputs = LossInputs(policy_v, ref_v.detach(), x0.detach(), group_index, seed, draw, _detach(old_v), _detach(kl_v))
    options = LossOptions(float(beta), clip_range, float(kl_weight), num_groups, group_size)
    if impl == "triton":
        # The KL reference is most often the reference itself: then the kernel reads it once.
        stages = _fused_loss(inputs, kl_v is ref_v, advantage.detach(), options, reduce_group_scores)
    else:
        stages = _staged_loss(impl, inputs, advantage.detach(), options, reduce_group_scores)
    loss, losses, clipped, score = stages
    return DGPOLoss(
        loss=loss,
        dsm_policy=losses.policy.detach(),
        dsm_ref=losses.ref.detach(),
        dsm_old=_detach(losses.old),
        kl=_detach(losses.kl),
        clipped=clipped,
        group_score=score.detach(),
    )


def guided_euler_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    *,
    guidance_scale: float,
    coefficients: Tensor,
    impl: str = "auto",
) -> Tensor:
    """Guidance and one Euler step of the probability-flow ODE in one pass: x_next = x + (σ_next − σ)·v.

    v = v_uncond + g·(v_cond − v_uncond) (classifier-free guidance, Ho and Salimans, 2022), or v_cond if
    ``v_uncond`` is None. Not differentiable.

    Args:
        x: state, float32 (B, …).
        v_cond, v_uncond: velocities in x's shape, any float dtype.
        guidance_scale: g.
        coefficients: float32 (1,) = [σ_next − σ], on x's device.

    Returns:
        x_next, float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    impl = _check_step(x, v_cond, v_uncond, None, coefficients, 1, impl, "guided_euler_step")
    with torch.no_grad():
        return function("guided_euler_step", impl)(x, v_cond, v_uncond, float(guidance_scale), coefficients)


def guided_dpmpp_2m_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    x0_prev: Tensor | None,
    *,
    guidance_scale: float,
    coefficients: Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Guidance and one step of DPM-Solver++(2M) (Lu et al., 2022, Algorithm 2) in one pass.

    v as in :func:`guided_euler_step`; x0 = x − σ·v; x_next = a·x + b·x0 + c·x0_prev, without the last term if
    ``x0_prev`` is None. Not differentiable.

    Args:
        x: state, float32 (B, …).
        v_cond, v_uncond: velocities in x's shape, any float dtype; ``v_uncond`` None for no guidance.
        x0_prev: the previous step's x0, float32, or None.
        guidance_scale: g.
        coefficients: float32 (4,) = [σ, a, b, c], on x's device.

    Returns:
        (x_next, x0), both float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    impl = _check_step(x, v_cond, v_uncond, x0_prev, coefficients, 4, impl, "guided_dpmpp_2m_step")
    step = function("guided_dpmpp_2m_step", impl)
    with torch.no_grad():
        return step(x, v_cond, v_uncond, x0_prev, float(guidance_scale), coefficients)


def _staged_loss(
    impl: str,
    inputs: LossInputs,
    advantage: Tensor,
    options: LossOptions,
    reduce_group_scores: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, reference.SampleLosses, Tensor, Tensor]:
    """The loss from its three stages, eager or each compiled, so that the hook between them may be any Python."""
    losses = function("sample_losses", impl)(*inputs)
    score = function("group_scores", impl)(losses, advantage, inputs.group_index, options.beta, options.group_size)
    if reduce_group_scores is not None:
        score = checks.check_scores(reduce_group_scores(score), score)
    loss, clipped = function("loss_from_scores", impl)(losses, score, advantage, inputs.group_index, *options)
    return loss, losses, clipped, score


def _fused_loss(
    inputs: LossInputs,
    kl_is_ref: bool,
    advantage: Tensor,
    options: LossOptions,
    reduce_group_scores: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, reference.SampleLosses, Tensor, Tensor]:
    """The loss from the Triton operators: partial sums, the hook's scores if there is one, and the loss."""
    policy_v, ref_v, x0, group_index, seed, draw, old_v, kl_v = inputs
    beta, clip_range, kl_weight, num_groups, group_size = options
    partials = ops.loss_partials(policy_v.detach(), ref_v, x0, old_v, kl_v, kl_is_ref, group_index, seed, draw)
    scores = None
    if reduce_group_scores is not None:
        numel = math.prod(x0.shape[1:])
        part = ops.group_scores(partials, numel, advantage, group_index, beta, group_size)
        scores = checks.check_scores(reduce_group_scores(part), part)
    group_inputs = ops.GroupLossInputs(
        policy_v=policy_v,
        x0=x0,
        kl_v=kl_v,
        group_index=group_index,
        seed=seed,
        draw=draw,
        partials=partials,
        advantage=advantage,
        scores=scores,
        has_old=old_v is not None,
        beta=beta,
        clip_range=clip_range,
        kl_weight=kl_weight,
        kl_batch=num_groups * group_size if num_groups and group_size else max(x0.shape[0], 1),
        num_groups=num_groups,
        group_size=group_size,
    )
    results = ops.GroupLossResults(*ops.group_loss(*group_inputs))
    losses = reference.SampleLosses(
        policy=results.losses[0],
        ref=results.losses[1],
        old=results.losses[2] if old_v is not None else None,
        kl=results.losses[-1] if kl_v is not None else None,
    )
    return results.loss, losses, results.clipped, results.scores


def _check_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    x0_prev: Tensor | None,
    coefficients: Tensor,
    count: int,
    impl: str,
    op: str,
) -> str:
    """Checks a guided step's arguments and resolves its implementation."""
    for name, state in (("x", x), ("x0_prev", x0_prev)):
        if state is None:
            continue
        checks.check_float(state, name)
        if state.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: the state is kept in float32, got {state.dtype}")
    for name, tensor in (("v_cond", v_cond), ("v_uncond", v_uncond), ("x0_prev", x0_prev)):
        if tensor is not None:
            checks.check_like(tensor, name, x, "x")
    checks.check_float(coefficients, "coefficients")
    if coefficients.shape != (count,):
        raise ValueError(f"coefficients: expected shape ({count},), got {tuple(coefficients.shape)}")
    checks.check_device(coefficients, "coefficients", x)
    return resolve(impl, op, x.device, (x.dtype, v_cond.dtype))


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
