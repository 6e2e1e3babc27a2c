"""The Triton implementations as PyTorch operators: schemas, fakes for tracing, and the loss's autograd formula.

Torch alone is imported here; an operator's body imports its kernels when it first runs. The operators take any
device: which devices the kernels run on is for :mod:`dgpo_kernels.dispatch` to say.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgpo_kernels import layout

_LIBRARY = torch.library.Library("dgpo_kernels", "DEF")
_NOISE = "Tensor group_index, Tensor seed, Tensor draw"


def _define(name: str, schema: str) -> Callable[[Callable], None]:
    """Declares an operator and returns the decorator for its implementation on every device."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    return torch.library.impl(f"dgpo_kernels::{name}", "default", lib=_LIBRARY)


def _fake(name: str) -> Callable[[Callable], Callable]:
    return torch.library.register_fake(f"dgpo_kernels::{name}", lib=_LIBRARY)


@_define("philox_normal", f"(SymInt[] shape, {_NOISE}, ScalarType dtype) -> Tensor")
def _philox_normal(shape: Sequence[int], group_index: Tensor, seed: Tensor, draw: Tensor, dtype: torch.dtype) -> Tensor:
    from dgpo_kernels.triton import noise

    return noise.philox_normal(shape, group_index, seed, draw, dtype)


@_fake("philox_normal")
def _(shape: Sequence[int], group_index: Tensor, seed: Tensor, draw: Tensor, dtype: torch.dtype) -> Tensor:
    return group_index.new_empty((group_index.shape[0], *shape), dtype=dtype)


@_define("group_noise", f"(Tensor x0, Tensor sigma, {_NOISE}) -> Tensor")
def _group_noise(x0: Tensor, sigma: Tensor, group_index: Tensor, seed: Tensor, draw: Tensor) -> Tensor:
    from dgpo_kernels.triton import noise

    return noise.group_noise(x0, sigma, group_index, seed, draw)


@_fake("group_noise")
def _(x0: Tensor, sigma: Tensor, group_index: Tensor, seed: Tensor, draw: Tensor) -> Tensor:
    return layout.empty_like(x0, layout.channels_of(x0))


@_define(
    "loss_partials",
    f"(Tensor policy_v, Tensor ref_v, Tensor x0, Tensor? old_v, Tensor? kl_v, bool kl_is_ref, {_NOISE}) -> Tensor",
)
def _loss_partials(
    policy_v: Tensor,
    ref_v: Tensor,
    x0: Tensor,
    old_v: Tensor | None,
    kl_v: Tensor | None,
    kl_is_ref: bool,
    group_index: Tensor,
    seed: Tensor,
    draw: Tensor,
) -> Tensor:
    from dgpo_kernels.triton.loss_partials import loss_partials

    return loss_partials(policy_v, ref_v, x0, old_v, kl_v, kl_is_ref, group_index, seed, draw)


@_fake("loss_partials")
def _(
    policy_v: Tensor, ref_v: Tensor, x0: Tensor, old_v: Tensor | None, kl_v: Tensor | None, *others: object
) -> Tensor:
    from dgpo_kernels.triton.launch import FORWARD_CONFIG

    itemsize = min(t.element_size() for t in (policy_v, ref_v, x0, old_v, kl_v) if t is not None)
    _, tiles, *_ = FORWARD_CONFIG.tiles(math.prod(policy_v.shape[1:]), itemsize)
    kinds = 2 + (old_v is not None) + (kl_v is not None)
    return policy_v.new_empty((kinds, policy_v.shape[0], tiles), dtype=torch.float32)


@_define(
    "group_scores",
    "(Tensor partials, SymInt numel, Tensor advantage, Tensor group_index, float beta, SymInt? group_size) -> Tensor",
)
def _group_scores(
    partials: Tensor, numel: int, advantage: Tensor, group_index: Tensor, beta: float, group_size: int | None
) -> Tensor:
    from dgpo_kernels.triton.group_loss import group_scores

    return group_scores(partials, numel, advantage, group_index, beta, group_size)


@_fake("group_scores")
def _(partials: Tensor, numel: int, advantage: Tensor, *others: object) -> Tensor:
    return advantage.new_empty(advantage.shape, dtype=torch.float32)


class GroupLossInputs(NamedTuple):
    """The arguments of ``group_loss`` in its schema's order.

    policy_v, x0, kl_v, group_index, seed, draw: inputs for the gradient's sake; the value comes from ``partials``.
    partials: float32 (kinds, B, tiles) of ``loss_partials``.
    scores: (B,), None for those of the partials.
    kl_batch: B of the KL term's mean.
    """

    policy_v: Tensor
    x0: Tensor
    kl_v: Tensor | None
    group_index: Tensor
    seed: Tensor
    draw: Tensor
    partials: Tensor
    advantage: Tensor
    scores: Tensor | None
    has_old: bool
    beta: float
    clip_range: float | None
    kl_weight: float
    kl_batch: int
    num_groups: int | None
    group_size: int | None


class GroupLossResults(NamedTuple):
    """Its results: (), (kinds, B), (B,), bool (B,), and for the backward pass (B,) without their 1/P, and 1/P ()."""

    loss: Tensor
    losses: Tensor
    scores: Tensor
    clipped: Tensor
    weights: Tensor
    inverse_groups: Tensor


@_define(
    "group_loss",
    f"(Tensor policy_v, Tensor x0, Tensor? kl_v, {_NOISE}, Tensor partials, Tensor advantage, Tensor? scores, "
    "bool has_old, float beta, float? clip_range, float kl_weight, SymInt kl_batch, "
    "SymInt? num_groups, SymInt? group_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _group_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from dgpo_kernels.triton.group_loss import group_loss

    inputs = GroupLossInputs(*arguments)
    return group_loss(
        inputs.partials,
        math.prod(inputs.policy_v.shape[1:]),
        inputs.advantage,
        inputs.group_index,
        inputs.scores,
        inputs.has_old,
        inputs.kl_v is not None,
        inputs.beta,
        inputs.clip_range,
        inputs.kl_weight / inputs.kl_batch,
        inputs.num_groups,
        inputs.group_size,
    )


@_fake("group_loss")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    partials = GroupLossInputs(*arguments).partials
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
    grad_loss: Tensor,
    policy_v: Tensor,
    x0: Tensor,
    kl_v: Tensor | None,
    group_index: Tensor,
    seed: Tensor,
    draw: Tensor,
    weights: Tensor,
    inverse_groups: Tensor,
    kl_weight: float,
    kl_batch: int,
) -> Tensor:
    from dgpo_kernels.triton.policy_gradient import policy_gradient

    scale = kl_weight / kl_batch
    return policy_gradient(grad_loss, policy_v, x0, kl_v, group_index, seed, draw, weights, inverse_groups, scale)


@_fake("policy_gradient")
def _(grad_loss: Tensor, policy_v: Tensor, *others: object) -> Tensor:
    return layout.empty_like(policy_v, layout.channels_of(policy_v))


# ctx is autograd's own: it takes any attribute.
def _save_for_gradient(ctx: Any, inputs: tuple, output: tuple) -> None:
    given, results = GroupLossInputs(*inputs), GroupLossResults(*output)
    ctx.kl_weight, ctx.kl_batch = given.kl_weight, given.kl_batch
    ctx.save_for_backward(
        given.policy_v,
        given.x0,
        given.kl_v,
        given.group_index,
        given.seed,
        given.draw,
        results.weights,
        results.inverse_groups,
    )
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """One gradient an input: that of policy_v, and None for the others."""
    grad = None
    if grad_loss is not None:
        grad = policy_gradient(grad_loss, *ctx.saved_tensors, ctx.kl_weight, ctx.kl_batch)
    return tuple(grad if name == "policy_v" else None for name in GroupLossInputs._fields)


torch.library.register_autograd("dgpo_kernels::group_loss", _gradient, setup_context=_save_for_gradient, lib=_LIBRARY)


@_define(
    "guided_euler_step",
    "(Tensor x, Tensor v_cond, Tensor? v_uncond, float guidance_scale, Tensor coefficients) -> Tensor",
)
def _guided_euler_step(
    x: Tensor, v_cond: Tensor, v_uncond: Tensor | None, guidance_scale: float, coefficients: Tensor
) -> Tensor:
    from dgpo_kernels.triton import step

    return step.guided_euler_step(x, v_cond, v_uncond, guidance_scale, coefficients)


@_fake("guided_euler_step")
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)


@_define(
    "guided_dpmpp_2m_step",
    "(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? x0_prev, float guidance_scale, Tensor coefficients) "
    "-> (Tensor, Tensor)",
)
def _guided_dpmpp_2m_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    x0_prev: Tensor | None,
    guidance_scale: float,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    from dgpo_kernels.triton import step

    return step.guided_dpmpp_2m_step(x, v_cond, v_uncond, x0_prev, guidance_scale, coefficients)


@_fake("guided_dpmpp_2m_step")
def _(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


philox_normal = torch.ops.dgpo_kernels.philox_normal.default
group_noise = torch.ops.dgpo_kernels.group_noise.default
loss_partials = torch.ops.dgpo_kernels.loss_partials.default
group_scores = torch.ops.dgpo_kernels.group_scores.default
group_loss = torch.ops.dgpo_kernels.group_loss.default
policy_gradient = torch.ops.dgpo_kernels.policy_gradient.default
guided_euler_step = torch.ops.dgpo_kernels.guided_euler_step.default
guided_dpmpp_2m_step = torch.ops.dgpo_kernels.guided_dpmpp_2m_step.default
