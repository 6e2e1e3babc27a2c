"""The shape of latents, and pixels from them."""

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

from dgpo_fast.errors import UserError


@torch.no_grad()
def decode_plainly(vae: AutoencoderKL, latents: Tensor, batch_size: int) -> np.ndarray:
    """Latents (B, C, H, W) → images, uint8 (B, height, width, 3)."""
    return torch.cat(
        [to_uint8(decode_pixels(vae, chunk, vae.dtype)).cpu() for chunk in latents.split(batch_size)]
    ).numpy()


def decode_pixels(vae: AutoencoderKL, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """What the decoder, in `dtype`, makes of (B, C, H, W) latents: (B, 3, height, width) fp32, about in [−1, 1]."""
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)  # some configurations have none
    return vae.decode(scaled.to(dtype), return_dict=False)[0].float()


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [−1, 1] → (B, H, W, 3) uint8, rounded as diffusers rounds."""
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def latent_shape(
    transformer: SD3Transformer2DModel, vae: AutoencoderKL, resolution: int | None
) -> tuple[int, int, int]:
    """(C, H, W) of a latent at `resolution` pixels, or at the size the transformer was trained at.

    Raises UserError for a resolution that the model cannot draw.
    """
    config = transformer.config
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    step, largest = scale * config.patch_size, scale * config.patch_size * config.pos_embed_max_size
    if resolution and (resolution % step or resolution > largest):
        raise UserError(f"rollout.resolution {resolution}: this model draws multiples of {step} up to {largest} pixels")
    side = resolution // scale if resolution else config.sample_size
    return config.in_channels, side, side
