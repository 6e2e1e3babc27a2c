"""Latents whose tokens are patches, cut by the family (FLUX.1, Chroma, Qwen-Image) or by the transformer (Stable
Diffusion 3, SANA and others), and shifts that grow with their number."""

from collections.abc import Mapping
from math import exp
from typing import Any

from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from dgpo_fast.models.family import Family

PATCH = 2
DEFAULT_LATENT_SIDE = 128
"""Of the autoencoder's latents, in the pipelines' default picture."""


class PackedLatents(Family):
    """A family whose transformer reads patches of 2 × 2 of the autoencoder's latents.

    Attributes:
        pixels: along each side of one number of a latent.
    """

    pixels: int

    @property
    def size(self) -> tuple[int, int]:
        side = DEFAULT_LATENT_SIDE * self.pixels
        return side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.architecture.transformer["in_channels"] // PATCH**2, height // self.pixels, width // self.pixels

    def image_tokens(self, latent: tuple[int, ...]) -> int:
        return latent[1] * latent[2] // PATCH**2


class UnpackedLatents(Family):
    """A family whose transformer reads the autoencoder's latents as they are, and cuts them into square patches.

    Attributes:
        pixels: along each side of one number of a latent.
    """

    pixels: int

    @property
    def patch(self) -> int:
        """Latents along each side of a token."""
        return self.architecture.transformer.get("patch_size", 2)

    @property
    def size(self) -> tuple[int, int]:
        side = self.architecture.transformer["sample_size"] * self.pixels
        return side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.architecture.transformer["in_channels"], height // self.pixels, width // self.pixels

    def image_tokens(self, latent: tuple[int, ...]) -> int:
        return latent[1] * latent[2] // self.patch**2


def shift_by_size(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift for a picture of `tokens` tokens, by the configuration of a scheduler with dynamic shifting."""
    numbers = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return shift_of_mu(scheduler, calculate_shift(tokens, *(scheduler.get(name, own) for name, own in numbers.items())))


def shift_of_mu(scheduler: Mapping[str, Any], mu: float) -> float:
    """The shift that a scheduler with dynamic shifting makes of a pipeline's μ."""
    return mu if scheduler.get("time_shift_type") == "linear" else exp(mu)
