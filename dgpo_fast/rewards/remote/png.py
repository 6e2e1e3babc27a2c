"""PNG files for sending pictures to another machine: written from arrays, and read without trust."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class TooLarge(ValueError):
    """An image that is too large to be unpacked."""


def encode_png(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3), as a PNG file."""
    buffer = io.BytesIO()
    # PNG's own filters leave little for a search of repetitions, which takes the most time, to find in a photograph.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)
    return buffer.getvalue()


def decode_png(data: bytes, max_pixels: int) -> np.ndarray:
    """The image, uint8 (H, W, 3), in an untrusted PNG file of 8-bit RGB.

    Raises:
        TooLarge: more than `max_pixels`, which are counted before anything is unpacked.
        ValueError: the file is not such a PNG.
    """
    if data[:8] != _SIGNATURE or data[12:16] != b"IHDR" or len(data) < 24:
        raise ValueError("no PNG")
    width, height = struct.unpack(">II", data[16:24])
    if width * height > max_pixels:
        raise TooLarge(f"{width} × {height} pixels, more than {max_pixels}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.mode == "RGB" and picture.size == (width, height):
                return np.array(picture)
            mode = picture.mode
    except Exception as error:  # a damaged file may raise anything in the decoder
        raise ValueError(f"no readable PNG ({type(error).__name__})") from error
    raise ValueError(f"a PNG of mode {mode}, not of 8-bit RGB")
