"""diffusers' `AutoencoderKL`, as several families use it: one number scales its latents, another shifts them."""

from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor, nn

from dgpo_fast.models.architecture import Architecture
from dgpo_fast.models.families.packing import UnpackedLatents

PUBLISHED: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "force_upcast": True,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""What the published autoencoders of Stable Diffusion, FLUX.1 and those that took them over have in common."""
FLUX1: Mapping[str, Any] = {
    **PUBLISHED,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""That of FLUX.1, by `ae_params` in util.py of the repository black-forest-labs/flux."""


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Pixels along each side of one number of a latent, by the autoencoder's configuration."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """`Family.decode`."""
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)  # some configurations have none
    return vae.decode(scaled.to(next(vae.decoder.parameters()).dtype), return_dict=False)[0].float()


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """`Family.encode_pixels`."""
    encoded = vae.encode(pixels.to(next(vae.encoder.parameters()).dtype)).latent_dist.mode().float()
    return (encoded - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


class KLLatents(UnpackedLatents):
    """A family whose transformer reads these latents."""

    vae_class = AutoencoderKL

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.pixels = pixels_per_latent(self.architecture.vae)
        self.multiple = self.patch * self.pixels

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return decode(vae, latents)

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        return encode(vae, pixels)
