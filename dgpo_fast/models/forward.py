"""Velocities of a batch: one forward of a transformer, with guidance or without."""

from collections.abc import Iterator

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from dgpo_fast.models.text_embeds import TextEmbeds


def predict(transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, text: TextEmbeds) -> Tensor:
    """Velocity v(x_t, t, c), (B, C, H, W), in the transformer's dtype.

    Args:
        x_t: (B, C, H, W) noisy latents, any float dtype.
        timestep: () or (B,), in [0, 1000].
        text: the B prompts.
    """
    return _velocity(transformer, x_t, timestep, *text.gathered())


def predict_pair(
    transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, text: TextEmbeds
) -> tuple[Tensor, Tensor]:
    """Velocities of the prompts and of their negative prompts in one forward of 2B samples, for guidance.

    Args:
        x_t: (B, C, H, W) noisy latents, any float dtype.
        timestep: () or (B,), in [0, 1000].
        text: the B prompts, with their negative prompts.
    """
    timestep = timestep.expand(len(x_t)).repeat(2)
    both = _velocity(transformer, torch.cat([x_t, x_t]), timestep, *text.gathered_pairs())
    conditional, negative = both.chunk(2)
    return conditional, negative


def _velocity(
    transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, prompt: Tensor, pooled: Tensor
) -> Tensor:
    return transformer(
        hidden_states=x_t.to(prompt.dtype),
        timestep=timestep.expand(len(x_t)),
        encoder_hidden_states=prompt,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def batch_slices(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `total` rows in order."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def is_guided(guidance_scale: float) -> bool:
    """Whether a prediction at this scale needs that of the negative prompt beside its own."""
    return guidance_scale > 1


def forwards_per_step(guidance_scale: float) -> int:
    """Forwards that a prediction of one sample takes: 2 with guidance, else 1."""
    return 2 if is_guided(guidance_scale) else 1


def guided(conditional: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: v_neg + g·(v_cond − v_neg), where the negative prompt is empty if none is given."""
    return negative + guidance_scale * (conditional - negative)
