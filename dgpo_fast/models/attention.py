"""Softmax attention by the kernels of diffusers' dispatcher, or written out."""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

MATMUL = "matmul"
DISPATCHED = {
    "native": AttentionBackendName.NATIVE,
    "native_flash": AttentionBackendName._NATIVE_FLASH,
    "native_cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
    "xformers": AttentionBackendName.XFORMERS,
}


def attend(backend: AttentionBackendName | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v of (B, S, H, D) tensors; None writes the products out."""
    if backend is not None:
        return dispatch_attention_fn(query, key, value, backend=backend)
    batch, _, heads, width = query.shape
    # Rows in order for each head: torch.matmul would copy its arguments, some of them more than once.
    query, key, value = (
        tensor.transpose(1, 2).reshape(batch * heads, -1, width) for tensor in (query * width**-0.5, key, value)
    )
    weights = torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1)
    return torch.bmm(weights, value).unflatten(0, (batch, heads)).transpose(1, 2)
