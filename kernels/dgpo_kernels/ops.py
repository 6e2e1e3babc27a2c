"""The Triton implementations as PyTorch operators: schemas, fakes for tracing, and the loss's autograd formula.

Torch alone is imported here; an operator's body imports its kernels when it first runs. The operators take any
device: which devices the kernels run on is for :mod:`dgpo_kernels.api` to say.
"""

import math
from typing import Any

import torch

from dgpo_kernels import layout

_LIBRARY = torch.library.Library("dgpo_kernels", "DEF")
_NOISE = "Tensor group_index, Tensor seed, Tensor draw"


def _define(name: str, schema: str) -> Any:
    """Declares an operator and returns the decorator for its implementation on every device."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    return torch.library.impl(f"dgpo_kernels::{name}", "default", lib=_LIBRARY)


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"dgpo_kernels::{name}", lib=_LIBRARY)


@_define("philox_normal", f"(SymInt[] shape, {_NOISE}, ScalarType dtype) -> Tensor")
def _philox_normal(shape, group_index, seed, draw, dtype):
    from dgpo_kernels.triton import noise

    return noise.philox_normal(shape, group_index, seed, draw, dtype)


@_fake("philox_normal")
def _(shape, group_index, seed, draw, dtype):
    return group_index.new_empty((group_index.shape[0], *shape), dtype=dtype)


@_define("group_noise", f"(Tensor x0, Tensor sigma, {_NOISE}) -> Tensor")
def _group_noise(x0, sigma, group_index, seed, draw):
    from dgpo_kernels.triton import noise

    return noise.group_noise(x0, sigma, group_index, seed, draw)


@_fake("group_noise")
def _(x0, sigma, group_index, seed, draw):
    return layout.empty_like(x0, layout.channels_of(x0))


@_define(
    "loss_partials",
    f"(Tensor policy_v, Tensor ref_v, Tensor x0, Tensor? old_v, Tensor? kl_v, bool kl_is_ref, {_NOISE}) -> Tensor",
)
def _loss_partials(policy_v, ref_v, x0, old_v, kl_v, kl_is_ref, group_index, seed, draw):
    from dgpo_kernels.triton import loss

    return loss.loss_partials(policy_v, ref_v, x0, old_v, kl_v, kl_is_ref, group_index, seed, draw)


@_fake("loss_partials")
def _(policy_v, ref_v, x0, old_v, kl_v, kl_is_ref, group_index, seed, draw):
    from dgpo_kernels.triton.launch import FORWARD_CONFIG

    itemsize = min(t.element_size() for t in (policy_v, ref_v, x0, old_v, kl_v) if t is not None)
    _, tiles, *_ = FORWARD_CONFIG.tiles(math.prod(policy_v.shape[1:]), itemsize)
    kinds = 2 + (old_v is not None) + (kl_v is not None)
    return policy_v.new_empty((kinds, policy_v.shape[0], tiles), dtype=torch.float32)


@_define(
    "group_scores",
    "(Tensor partials, SymInt numel, Tensor advantage, Tensor group_index, float beta, SymInt? group_size) -> Tensor",
)
def _group_scores(partials, numel, advantage, group_index, beta, group_size):
    from dgpo_kernels.triton import loss

    return loss.group_scores(partials, numel, advantage, group_index, beta, group_size)


@_fake("group_scores")
def _(partials, numel, advantage, group_index, beta, group_size):
    return advantage.new_empty(advantage.shape, dtype=torch.float32)


# The predictions are inputs for the gradient's sake: the value comes from the partial sums alone. Results: loss (),
# losses (kinds, B), scores (B,), clipped (B,), and for the backward pass weights (B,) and 1/P ().
@_define(
    "group_loss",
    f"(Tensor policy_v, Tensor x0, Tensor? kl_v, {_NOISE}, Tensor partials, Tensor advantage, Tensor? scores, "
    "bool has_old, float beta, float? clip_range, float kl_weight, SymInt kl_batch, "
    "SymInt? num_groups, SymInt? group_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _group_loss(
    policy_v,
    x0,
    kl_v,
    group_index,
    seed,
    draw,
    partials,
    advantage,
    scores,
    has_old,
    beta,
    clip_range,
    kl_weight,
    kl_batch,
    num_groups,
    group_size,
):
    from dgpo_kernels.triton import loss

    return loss.group_loss(
        partials,
        math.prod(policy_v.shape[1:]),
        advantage,
        group_index,
        scores,
        has_old,
        kl_v is not None,
        beta,
        clip_range,
        kl_weight / kl_batch,
        num_groups,
        group_size,
    )


@_fake("group_loss")
def _(policy_v, x0, kl_v, group_index, seed, draw, partials, advantage, *options):
    per_sample = partials.new_empty((partials.shape[1],))
    return (
        partials.new_empty(()),
        partials.new_empty(partials.shape[:2]),
        torch.empty_like(per_sample),
        torch.empty_like(per_sample, dtype=torch.bool),
        torch.empty_like(per_sample),
        partials.new_empty(()),
    )


@_define(
    "policy_gradient",
    f"(Tensor grad_loss, Tensor policy_v, Tensor x0, Tensor? kl_v, {_NOISE}, Tensor weights, Tensor inverse_groups, "
    "float kl_weight, SymInt kl_batch) -> Tensor",
)
def _policy_gradient(
    grad_loss, policy_v, x0, kl_v, group_index, seed, draw, weights, inverse_groups, kl_weight, kl_batch
):
    from dgpo_kernels.triton import loss

    scale = kl_weight / kl_batch
    return loss.policy_gradient(grad_loss, policy_v, x0, kl_v, group_index, seed, draw, weights, inverse_groups, scale)


@_fake("policy_gradient")
def _(grad_loss, policy_v, *others):
    return layout.empty_like(policy_v, layout.channels_of(policy_v))


def _save_for_gradient(ctx, inputs, output):
    policy_v, x0, kl_v, group_index, seed, draw = inputs[:6]
    weights, inverse_groups = output[4:]
    ctx.kl_weight, ctx.kl_batch = inputs[12:14]
    ctx.save_for_backward(policy_v, x0, kl_v, group_index, seed, draw, weights, inverse_groups)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_loss, *_):
    grad = None
    if grad_loss is not None:
        grad = policy_gradient(grad_loss, *ctx.saved_tensors, ctx.kl_weight, ctx.kl_batch)
    return grad, *[None] * 15


torch.library.register_autograd("dgpo_kernels::group_loss", _gradient, setup_context=_save_for_gradient, lib=_LIBRARY)


@_define(
    "guided_euler_step",
    "(Tensor x, Tensor v_cond, Tensor? v_uncond, float guidance_scale, Tensor coefficients) -> Tensor",
)
def _guided_euler_step(x, v_cond, v_uncond, guidance_scale, coefficients):
    from dgpo_kernels.triton import step

    return step.guided_euler_step(x, v_cond, v_uncond, guidance_scale, coefficients)


@_fake("guided_euler_step")
def _(x, v_cond, v_uncond, guidance_scale, coefficients):
    return torch.empty_like(x)


@_define(
    "guided_dpmpp_2m_step",
    "(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? x0_prev, float guidance_scale, Tensor coefficients) "
    "-> (Tensor, Tensor)",
)
def _guided_dpmpp_2m_step(x, v_cond, v_uncond, x0_prev, guidance_scale, coefficients):
    from dgpo_kernels.triton import step

    return step.guided_dpmpp_2m_step(x, v_cond, v_uncond, x0_prev, guidance_scale, coefficients)


@_fake("guided_dpmpp_2m_step")
def _(x, v_cond, v_uncond, x0_prev, guidance_scale, coefficients):
    return torch.empty_like(x), torch.empty_like(x)


philox_normal = torch.ops.dgpo_kernels.philox_normal.default
group_noise = torch.ops.dgpo_kernels.group_noise.default
loss_partials = torch.ops.dgpo_kernels.loss_partials.default
group_scores = torch.ops.dgpo_kernels.group_scores.default
group_loss = torch.ops.dgpo_kernels.group_loss.default
policy_gradient = torch.ops.dgpo_kernels.policy_gradient.default
guided_euler_step = torch.ops.dgpo_kernels.guided_euler_step.default
guided_dpmpp_2m_step = torch.ops.dgpo_kernels.guided_dpmpp_2m_step.default
