"""JPEG compressibility: how small a picture gets; with a negative weight, how rich in detail it is."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.records import Metadata
from dgpo_fast.rewards.protocol import require_images

QUALITY = 95
KILOBYTES_PER_POINT = 500


class JpegReward:
    """Score = −(size of the picture as a JPEG of quality 95, in kB of 1,000 bytes) / 500.

    Always negative; a flat picture scores highest. The part `kilobytes` is the size itself. `jpeg=-1` rewards detail.
    """

    runs_on_cpu = True
    independent_images = True
    metadata_keys = ()

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores float32 (B,) for uint8 (B, H, W, 3) images; prompts and metadata are not used.

        Raises:
            UserError: images of another type or shape.
        """
        require_images("jpeg", images)
        kilobytes = np.array([_jpeg_bytes(image) / 1000 for image in images], np.float32)
        return -kilobytes / KILOBYTES_PER_POINT, {"kilobytes": kilobytes}

    def self_test(self) -> None:
        """Raises UserError unless noise takes the room that it should: JPEG keeps red more exactly than blue."""
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
        pictures = np.full((3, 64, 64, 3), 128, np.uint8)
        pictures[1, ..., 2], pictures[2, ..., 0] = noise, noise
        flat, blue, red = self(pictures, [""] * 3, [{}] * 3)[1]["kilobytes"].tolist()
        if not (0 < 3 * flat < blue and 1.1 * blue < red):
            seen = f"a flat picture takes {flat:.2f} kB, blue noise {blue:.2f} and red noise {red:.2f}"
            raise UserError(f"reward 'jpeg' failed its self-test: {seen}: reinstall pillow")


def _jpeg_bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
