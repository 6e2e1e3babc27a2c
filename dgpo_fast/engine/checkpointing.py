"""Activations of the policy's blocks made again in the backward pass: less memory, the same gradient."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from dgpo_fast.models.family import family_of

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
LINEAR = ("linear", "_linear_pointwise")


def checkpoint_blocks(
    transformer: nn.Module, kind: str, again: Callable[[], AbstractContextManager] | None = None
) -> None:
    """Checkpoints each block: "blocks" keeps its inputs alone, "selective" a few outputs that cost much.

    Args:
        transformer: its blocks compute as before.
        kind: as `engine.checkpointing`, but not "none".
        again: entered if a block computes again in a backward, in which no mode of the forward is on.
    """
    contexts = noop_context_fn if kind == "blocks" else partial(create_selective_checkpoint_contexts, _keep_expensive)
    if again:
        contexts = partial(_within, again, contexts)
    # The compiler takes no context function that does nothing, and of the others none but torch's own.
    way = {} if contexts is noop_context_fn else {"context_fn": contexts}
    for block in family_of(transformer).blocks(transformer):
        block.forward = partial(_checkpointed, block.forward, way)


def _within(again: Callable, contexts: Callable) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a block's forward, and of what is computed again."""
    first, second = contexts()
    return first, _both(again(), second)


@contextmanager
def _both(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


# Any: arguments are those of the block, or of whichever operation it comes to.
def _checkpointed(forward: Callable, way: Mapping[str, Any], *args: object, **kwargs: Any) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No block draws random numbers: the generators' states need not be kept.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **way, **kwargs)


def _keep_expensive(context: object, operation: OpOverload, *args: Any, **kwargs: object) -> CheckpointPolicy:
    """Keeps attention, and products with more columns summed over than left: they cost most for each number kept.

    Keeping every product would take more than no checkpointing at all if frozen layers save no inputs (LoRA).
    """
    name = operation._schema.name.split("::")[-1]
    kept = "attention" in name
    if name in PRODUCTS:
        kept = args[-2].shape[-1] > args[-1].shape[-1]
    elif name in LINEAR:
        kept = args[1].shape[1] > args[1].shape[0]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
