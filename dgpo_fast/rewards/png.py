"""Pictures on their way to another machine: PNG files, written from arrays and read with suspicion."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


class TooLarge(ValueError):
    """More than may be unpacked."""


def encode_png(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3), as a PNG file, packed fast rather than small."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes, max_pixels: int) -> np.ndarray:
    """The image, uint8 (H, W, 3), in a PNG file of 8-bit RGB, which nobody vouches for.

    Raises:
        ValueError: no such PNG, or more than `max_pixels`, which are counted before any is unpacked.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.width * picture.height > max_pixels:
                raise TooLarge(f"{picture.width} × {picture.height} pixels, more than {max_pixels}")
            if picture.mode != "RGB":
                raise ValueError(f"a PNG of mode {picture.mode}, not of 8-bit RGB")
            return np.array(picture)
    except ValueError:
        raise
    except Exception as error:  # a damaged file may raise anything in the decoder
        raise ValueError(f"no readable PNG ({type(error).__name__})") from error
