"""Activations of the policy's blocks made again in the backward pass: less memory, the same gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

# What costs most to compute is kept by the selective kind: matrix products and attention.
KEPT = ("mm", "addmm", "bmm", "baddbmm", "linear")


def checkpoint_blocks(transformer: SD3Transformer2DModel, kind: str) -> None:
    """Checkpoints each block: "blocks" keeps its inputs alone, "selective" the outputs of its expensive operations."""
    context = noop_context_fn if kind == "blocks" else partial(create_selective_checkpoint_contexts, _keep_expensive)
    for block in transformer.transformer_blocks:
        block.forward = partial(_checkpointed, block.forward, context)


def _checkpointed(forward: Callable, context: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No block draws random numbers: the generators' states need not be kept.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context, **kwargs)


def _keep_expensive(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation._schema.name.split("::")[-1]
    kept = name in KEPT or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
