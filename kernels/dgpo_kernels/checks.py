"""Checks of the public ops' arguments: each error names the argument, what was expected and what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, int):
        if not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
        return torch.full((), seed - (1 << 64) if seed >= 1 << 63 else seed, dtype=torch.int64, device=device)
    return _check_scalar(seed, "seed", device)


def draw_tensor(draw: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(draw, int):
        if not 0 <= draw < 1 << 32:
            raise ValueError(f"draw: expected 0 <= draw < 2**32, got {draw}")
        return torch.full((), draw, dtype=torch.int64, device=device)
    return _check_scalar(draw, "draw", device)


def _check_scalar(value: Tensor, name: str, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int or a 0-dim int64 tensor, got {type(value).__name__}")
    if value.dtype != torch.int64 or value.dim() != 0:
        raise TypeError(f"{name}: expected a 0-dim int64 tensor, got {value.dtype} of shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    return value


def check_float(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected one of {dtype_names(FLOAT_DTYPES)}, got {tensor.dtype}")


def check_samples(tensor: Tensor, name: str) -> None:
    check_float(tensor, name)
    if tensor.dim() < 2:
        raise ValueError(
            f"{name}: expected shape (B, ...) with at least one element dimension, got {tuple(tensor.shape)}"
        )
    check_sample_size(math.prod(tensor.shape[1:]), name)


def check_sample_size(numel: int, name: str) -> None:
    if not 0 < numel <= 1 << 34:
        raise ValueError(f"{name}: expected 1 to 2**34 elements in a sample, got {numel}")


def check_like(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    check_float(tensor, name)
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: expected {other_name}'s shape {tuple(other.shape)}, got {tuple(tensor.shape)}")
    check_device(tensor, name, other)


def check_device(tensor: Tensor, name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected a tensor on {other.device}, got one on {tensor.device}")


def check_group_index(group_index: Tensor, samples: Tensor | None = None) -> None:
    if not isinstance(group_index, Tensor) or group_index.dtype != torch.int64 or group_index.dim() != 1:
        got = (
            f"{group_index.dtype} of shape {tuple(group_index.shape)}"
            if isinstance(group_index, Tensor)
            else group_index
        )
        raise TypeError(f"group_index: expected an int64 tensor of shape (B,), got {got}")
    if samples is not None:
        if group_index.shape[0] != samples.shape[0]:
            raise ValueError(f"group_index: expected shape ({samples.shape[0]},), got {tuple(group_index.shape)}")
        check_device(group_index, "group_index", samples)


def check_loss_options(
    beta: float,
    old_v: Tensor | None,
    clip_range: float | None,
    kl_v: Tensor | None,
    kl_weight: float,
    num_groups: int | None,
    group_size: int | None,
) -> None:
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}")
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"clip_range: expected a positive number or None, got {clip_range}")
    if clip_range is not None and old_v is None:
        raise ValueError("clip_range: needs old_v, got None")
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight: expected a number >= 0, got {kl_weight}")
    if kl_weight and kl_v is None:
        raise ValueError(f"kl_weight: {kl_weight} needs kl_v, got None")
    for name, count in (("num_groups", num_groups), ("group_size", group_size)):
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected a positive integer or None, got {count}")


def check_scores(scores: Tensor, part: Tensor) -> Tensor:
    if scores.shape != part.shape or scores.device != part.device:
        raise ValueError(
            f"reduce_group_scores: expected a tensor of shape {tuple(part.shape)} on {part.device}, "
            f"got {tuple(scores.shape)} on {scores.device}"
        )
    return scores.detach().to(part.dtype)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
