"""Attention of SD3's blocks. diffusers' processor does not go through its attention dispatcher."""

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dgpo_fast.models.attention import DISPATCHED, attend


class JointAttention:
    """SD3's attention over image and text tokens: what diffusers' processor computes, through its dispatcher.

    `transformer.set_attention_backend` of diffusers works on it.

    Args:
        name: the kernel, a key of `DISPATCHED` or "matmul".
    """

    _parallel_config = None

    def __init__(self, name: str):
        self._attention_backend = DISPATCHED.get(name)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: object
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of (B, N, C) image tokens, and of (B, T, C) text tokens beside them if there are any."""
        images = hidden_states.shape[1]
        query, key, value = (_heads(attn, layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = _norm(attn.norm_q, query), _norm(attn.norm_k, key)
        if encoder_hidden_states is not None:
            text_key, text_value = (
                _heads(attn, layer(encoder_hidden_states)) for layer in (attn.add_k_proj, attn.add_v_proj)
            )
            key = torch.cat([key, _norm(attn.norm_added_k, text_key)], dim=1)
            value = torch.cat([value, text_value], dim=1)
            # The last block drops its text tokens. Training keeps their queries: their weights then have gradients, 0.
            if not attn.context_pre_only or torch.is_grad_enabled():
                text_query = _heads(attn, attn.add_q_proj(encoder_hidden_states))
                query = torch.cat([query, _norm(attn.norm_added_q, text_query)], dim=1)
        attended = attend(self._attention_backend, query, key, value).flatten(2).to(query.dtype)
        # to_out[1] is a dropout, which SD3 has at 0.
        image_out = attn.to_out[0](attended[:, :images])
        if encoder_hidden_states is None:
            return image_out
        text_out = attended[:, images:]
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _heads(attn: Attention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attn.heads, -1))


def _norm(norm: nn.Module | None, tensor: Tensor) -> Tensor:
    return tensor if norm is None else norm(tensor)
