"""Which implementation of an op runs: it is chosen explicitly, and nothing falls back in silence."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence

import torch

from dgpo_kernels import ops, reference
from dgpo_kernels.checks import dtype_names

IMPLEMENTATIONS = ("auto", "eager", "compile", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_logger = logging.getLogger("dgpo_kernels")


def resolve(impl: str, op: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """Turns "auto" into an implementation and refuses one that cannot run here."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl not in ("auto", "triton"):
        return impl
    obstacle = _triton_obstacle(device, dtypes)
    if impl == "triton":
        if obstacle is not None:
            raise RuntimeError(f"impl='triton' of {op} cannot run: {obstacle}; use impl='eager' or 'compile'")
        return impl
    # The interpreter is for tests: it is used if asked for, never chosen.
    chosen = "triton" if obstacle is None and device.type == "cuda" else "eager"
    if not torch.compiler.is_compiling():
        _announce(op, device.type, chosen, obstacle or "")
    return chosen


def function(name: str, impl: str) -> Callable:
    """The function of a resolved implementation."""
    if impl == "triton":
        return getattr(ops, name)
    return getattr(reference, name) if impl == "eager" else _compiled(name)


@functools.cache
def _compiled(name: str) -> Callable:
    return torch.compile(getattr(reference, name), fullgraph=True)


def _triton_obstacle(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    if not _HAS_TRITON:
        return "the triton package is not installed"
    if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
        return f"it needs CUDA tensors, got {device.type}"
    for dtype in dtypes:
        if dtype not in TRITON_DTYPES:
            return f"it needs {dtype_names(TRITON_DTYPES)}, got {dtype_names((dtype,))}"
    return None


@functools.cache
def _announce(op: str, device: str, chosen: str, why: str) -> None:
    _logger.info("%s on %s: impl='auto' chose %r%s", op, device, chosen, f" ({why})" if why else "")
