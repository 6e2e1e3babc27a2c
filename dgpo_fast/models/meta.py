"""A model without data: its forwards run on the meta device, where shapes are followed and nothing is computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgpo_fast.models.family import Family, Rows, rounded_up
from dgpo_fast.models.forward import Given, velocity
from dgpo_fast.models.text_embeds import TextEmbeds


@dataclass(frozen=True)
class RowShape:
    """One named tensor of a prompt's row.

    Attributes:
        name: as the model's family has it.
        shape: of one prompt.
        dtype: None for the dtype of the run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class SampleShape:
    """What one sample is made of.

    Attributes:
        latent: (C, H, W).
        rows: the tensors of a prompt.
        embedded: whether the transformer reads a number for guidance.
    """

    latent: tuple[int, ...]
    rows: tuple[RowShape, ...]
    embedded: bool = False

    @classmethod
    def of(cls, latent: tuple[int, ...], text: TextEmbeds) -> "SampleShape":
        """Of samples with such latents and prompts."""
        return cls(latent, _row_shapes(text.rows), text.embedded is not None)

    @classmethod
    def of_given(cls, latent: tuple[int, ...], given: Given) -> "SampleShape":
        """Of samples with such latents, of which a forward is given some."""
        return cls(latent, _row_shapes(given.condition), given.embedded is not None)

    def latents(self, batch: int, dtype: torch.dtype, device: torch.device | str = "meta") -> Tensor:
        """(B, C, H, W) without data, or of whatever is there."""
        return torch.empty(batch, *self.latent, dtype=dtype, device=device)

    def text(self, batch: int, dtype: torch.dtype, device: torch.device | str = "meta") -> TextEmbeds:
        """The prompts of `batch` samples: ones, which a mask takes for tokens that are there."""
        rows = {row.name: torch.ones(batch, *row.shape, dtype=row.dtype or dtype, device=device) for row in self.rows}
        return TextEmbeds.of_samples(rows).with_embedded(1.0 if self.embedded else None)

    def text_bytes(self, dtype: torch.dtype) -> int:
        """Of one prompt's row."""
        return sum(math.prod(row.shape) * (row.dtype or dtype).itemsize for row in self.rows)

    def predict(self, transformer: nn.Module, batch: int, dtype: torch.dtype) -> Tensor:
        """A forward of `batch` samples: (B, C, H, W) without data."""
        time, text = torch.empty(batch, dtype=dtype, device="meta"), self.text(batch, dtype)
        embedded = time if self.embedded else None
        return velocity(transformer, Given(self.latents(batch, dtype), time, text.rows, embedded))


def sample_shape(family: Family, latent: tuple[int, ...], length: int, *, embedded: bool) -> SampleShape:
    """What a sample of a run is made of, with the longest prompt that is read.

    Args:
        family: of the model.
        latent: (C, H, W).
        length: `rollout.max_sequence_length`.
        embedded: whether the transformer reads a number for guidance.
    """
    row = family.random_condition("", length)
    return SampleShape.of(
        latent, TextEmbeds.of_samples(stacked(family, [row])).with_embedded(1.0 if embedded else None)
    )


def stacked(family: Family, rows: Sequence[Rows], tokens: int = 0) -> Rows:
    """Encoded prompts → (U, …) tensors of one length, at least `tokens`, rounded up as the family pads."""
    if family.pads_to:
        tokens = max(tokens, *(family.text_tokens(row) for row in rows))
        tokens = rounded_up(tokens, family.pads_to)
    return family.stack(rows, tokens if family.pads_to else 0)


def _row_shapes(rows: Rows) -> tuple[RowShape, ...]:
    dtypes = {name: None if tensor.is_floating_point() else tensor.dtype for name, tensor in rows.items()}
    return tuple(RowShape(name, tuple(tensor.shape[1:]), dtypes[name]) for name, tensor in rows.items())


class FusedAttention(TorchFunctionMode):
    """Attention as the one operation that it is on a device, where the meta device would take it apart.

    Args:
        operation: called with query, key, value and the mask, None if there is none; gives the output first.
    """

    def __init__(self, operation: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]):
        super().__init__()
        self.operation = operation

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            return self.operation(given["query"], given["key"], given["value"], given.get("attn_mask"))[0]
        return func(*args, **kwargs)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Attention as one operation of a GPU, for which torch's FLOP counter has a formula; a mask changes no FLOPs."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
