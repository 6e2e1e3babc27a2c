"""A model without data: its forwards run on the meta device, where shapes are followed and nothing is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class SampleShape:
    """What one sample is made of.

    Attributes:
        latent: (C, H, W).
        text: (T, D) of the token embeddings.
        pooled: E of the pooled embedding.
    """

    latent: tuple[int, ...]
    text: tuple[int, ...]
    pooled: int

    def latents(self, batch: int, dtype: torch.dtype) -> Tensor:
        """(B, C, H, W) without data."""
        return torch.empty(batch, *self.latent, dtype=dtype, device="meta")

    def predict(self, transformer: SD3Transformer2DModel, batch: int, dtype: torch.dtype) -> Tensor:
        """A forward of `batch` samples: (B, C, H, W) without data."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(batch, *shape, dtype=dtype, device="meta")

        return transformer(
            hidden_states=self.latents(batch, dtype),
            timestep=empty(),
            encoder_hidden_states=empty(*self.text),
            pooled_projections=empty(self.pooled),
            return_dict=False,
        )[0]


class FusedAttention(TorchFunctionMode):
    """Attention as the one operation that it is on a device, where the meta device would take it apart.

    Args:
        operation: called with query, key and value; gives the output first.
    """

    def __init__(self, operation: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]):
        super().__init__()
        self.operation = operation

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return self.operation(query, key, value)[0]
        return func(*args, **kwargs)
