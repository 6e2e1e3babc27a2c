"""The shape of latents, and pixels from them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dgpo_fast.config.bounds import SMALLEST_SIDE, size_of
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Family, family_of


class Pictures(NamedTuple):
    """Decoded pictures.

    Attributes:
        images: uint8 (B, height, width, 3).
        faults: uint8 (B,), what is wrong with each picture: an index of `wording.FAULTS`, 0 if all of it is finite.
    """

    images: np.ndarray
    faults: np.ndarray


@torch.no_grad()
def decode_plainly(vae: nn.Module, latents: Tensor, batch_size: int) -> Pictures:
    """The pictures of latents (B, C, H, W)."""
    parts = decode_in_batches(lambda chunk: decode_pixels(vae, chunk), latents, batch_size)
    return Pictures(*(part.cpu().numpy() for part in parts))


def decode_in_batches(pixels_of: Callable[[Tensor], Tensor], latents: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) latents → the parts of their `Pictures`, on their device.

    Args:
        pixels_of: (b, C, H, W) latents → (b, 3, height, width) pixels.
        latents: of all pictures.
        batch_size: latents that are decoded at a time.
    """
    images, faults = [], []
    for chunk in latents.split(batch_size):
        pixels = pixels_of(chunk)
        images.append(to_uint8(pixels))
        faults.append(find_faults(chunk, pixels))
    return torch.cat(images), torch.cat(faults)


def find_faults(latents: Tensor, pixels: Tensor) -> Tensor:
    """`Pictures.faults` of decoded latents: (B,) uint8 on their device, found without waiting for it.

    Args:
        latents: (B, C, H, W).
        pixels: (B, 3, height, width), what the decoder made of them.
    """
    drawn, decoded = _fault(latents), _fault(pixels)
    return torch.where(drawn > 0, drawn, torch.where(decoded > 0, decoded + 2, decoded))


def _fault(numbers: Tensor) -> Tensor:
    """(B, …) → (B,) uint8: 1 for a row with NaN, 2 for one with infinity, else 0."""
    largest = torch.linalg.vector_norm(numbers.flatten(1), torch.inf, 1)  # NaN if one of them is
    return (largest.isnan() + 2 * largest.isinf()).to(torch.uint8)


def decode_pixels(vae: nn.Module, latents: Tensor) -> Tensor:
    """What the decoder makes of (B, C, H, W) latents: (B, 3, height, width) fp32, about in [−1, 1]."""
    return family_of(vae).decode(vae, latents).float()


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [−1, 1] → (B, H, W, 3) uint8, rounded as diffusers rounds."""
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def latent_shape(family: Family, resolution: int | str | None, setting: str = "rollout.resolution") -> tuple[int, ...]:
    """(C, H, W) of a latent at `resolution`, the value of `setting`, or at the size that the model's own files name.

    Raises UserError, with the nearest sizes, for a resolution that the model cannot draw.
    """
    if resolution is None:
        return family.latent_shape(*family.size)
    height, width = size_of(resolution)
    step, largest = family.multiple, family.largest_side
    allowed = [_nearest(side, step, largest) for side in (height, width)]
    if allowed != [[height], [width]]:
        high, wide = (" or ".join(map(str, sides)) for sides in allowed)
        limit = f" up to {largest} pixels" if largest else " pixels"
        raise UserError(
            f"{setting} {resolution}: this model draws multiples of {step}{limit}; "
            + (f"the nearest: {high}" if height == width else f"the nearest: {high} high, {wide} wide")
        )
    return family.latent_shape(height, width)


def _nearest(side: int, step: int, largest: int | None) -> list[int]:
    """The multiples of `step` nearest to `side` that a picture may have: `side` alone if it is one."""
    smallest = -(-SMALLEST_SIDE // step) * step
    return sorted(
        {min(max(count * step, smallest), largest or side + step) for count in (side // step, -(-side // step))}
    )
