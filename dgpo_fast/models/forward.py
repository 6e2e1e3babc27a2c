"""Velocities of a batch: one forward of a transformer, with guidance or without."""

from collections.abc import Iterator

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from dgpo_fast.models.text_embeds import TextEmbeds


def predict(transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, text: TextEmbeds) -> Tensor:
    """Velocity v(x_t, t, c), (B, C, H, W), in the transformer's dtype.

    Args:
        x_t: (B, C, H, W) noisy latents, any float dtype. B can be 0; the forward is then made for other processes.
        timestep: () or (B,), in [0, 1000].
        text: the B prompts.
    """
    return _velocity(transformer, x_t, timestep, *text.gathered())


def predict_pair(
    transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, text: TextEmbeds, empty: TextEmbeds
) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional velocities in one forward of 2B samples, for guidance.

    Args:
        x_t: (B, C, H, W) noisy latents, any float dtype.
        timestep: () or (B,), in [0, 1000].
        text: the B prompts.
        empty: the empty prompt, one row.
    """
    rows = zip(text.gathered(), (empty.prompt, empty.pooled), strict=True)
    both = [torch.cat([tensor, of_empty.expand_as(tensor)]) for tensor, of_empty in rows]
    timestep = timestep.expand(len(x_t)).repeat(2)
    conditional, unconditional = _velocity(transformer, torch.cat([x_t, x_t]), timestep, *both).chunk(2)
    return conditional, unconditional


def _velocity(
    transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, prompt: Tensor, pooled: Tensor
) -> Tensor:
    if len(x_t) == 0:  # the others compute, and need this process's shards: a forward of which nothing is used
        x_t, prompt, pooled = (rows.new_zeros(1, *rows.shape[1:]) for rows in (x_t, prompt, pooled))
        return _velocity(transformer, x_t, timestep.new_ones(1), prompt, pooled)[:0]
    return transformer(
        hidden_states=x_t.to(prompt.dtype),
        timestep=timestep.expand(len(x_t)),
        encoder_hidden_states=prompt,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def batch_slices(total: int, size: int, most: int = 0) -> Iterator[slice]:
    """Slices of at most `size` that cover `total` rows in order, then empty ones, as many as `most` rows need."""
    starts = range(0, max(total, most), size)
    return (slice(min(start, total), min(start + size, total)) for start in starts)


def forwards_per_step(guidance_scale: float) -> int:
    """Forwards that a prediction of one sample takes: with guidance, that of the empty prompt beside its own."""
    return 2 if guidance_scale > 1 else 1


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: v_uncond + g·(v_cond − v_uncond)."""
    return unconditional + guidance_scale * (conditional - unconditional)
