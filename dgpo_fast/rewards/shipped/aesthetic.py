"""The `aesthetic` reward: LAION's improved aesthetic predictor, one linear map of CLIP's image feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dgpo_fast.errors import UserError
from dgpo_fast.records import Metadata
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.protocol import require_images
from dgpo_fast.rewards.shipped import models
from dgpo_fast.rewards.shipped.clip import OPENAI, Clip

_REPOSITORY = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main"
WEIGHTS = f"{_REPOSITORY}/sac%2Blogos%2Bava1-l14-linearMSE.pth"
_LAYERS = (0, 2, 4, 6, 7)  # the numbers in between are dropout, which scoring leaves out
_MARGIN = 0.2  # by which a photograph must beat what shows nothing; the scores of photographs spread by about 1


class AestheticReward:
    """How well people like a picture, 1 to 10, regardless of the prompt; the mean of photographs is about 5.

    The predictor's five layers, 768-1024-128-64-16-1, have no activations in between, so they are multiplied out once.
    """

    independent_images = True
    metadata_keys = ()

    def __init__(self, clip: str | Path = OPENAI.source, weights: str | Path = WEIGHTS) -> None:
        """
        Args:
            clip: hub name or folder of OpenAI's CLIP ViT-L/14.
            weights: `sac+logos+ava1-l14-linearMSE.pth` (3.7 MB), a file or the address it is downloaded from.

        Raises:
            UserError: one of the two is not available, is another model under the published name, or does not fit.
        """
        self._clip = Clip.load("aesthetic", OPENAI, clip)
        loaded = models.load_weights("aesthetic", weights, lambda: _download(str(weights)))
        weight, bias = self._collapsed(loaded, weights)
        device = models.default_device()
        self._weight, self._bias = weight.to(device), bias.to(device)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> np.ndarray:
        """Scores float32 (B,) of uint8 images (B, H, W, 3); prompts and metadata are not used.

        Raises:
            UserError: images of another type or shape.
        """
        require_images("aesthetic", images)
        if not len(images):
            return np.zeros(0, np.float32)
        return (self._clip.features(images) @ self._weight + self._bias).cpu().numpy()

    def self_test(self) -> None:
        """Raises UserError unless CLIP tells colours apart and a photograph scores as photographs do, and clearly above
        noise and plain grey."""
        self._clip.self_test("aesthetic")
        pictures = np.concatenate([golden.photo(), golden.noise(), golden.grey()])
        photo, noise, grey = self(pictures, [""] * 3, [{}] * 3).tolist()
        if not 3 < photo < 8:
            seen = f"a portrait scores {photo:.2f}, not between 3 and 8"
        elif not photo > max(noise, grey) + _MARGIN:
            seen = f"a portrait scores {photo:.2f}, noise {noise:.2f} and plain grey {grey:.2f}"
        else:
            return
        raise UserError(f"reward 'aesthetic' failed its self-test: {seen}: wrong weights?")

    def _collapsed(self, layers: Mapping[str, torch.Tensor], source: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers as one map: weight (D,) and bias (). A chain of linear maps is one."""
        width = self._clip.model.config.projection_dim
        weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for number in _LAYERS:
            w, b = layers.get(f"layers.{number}.weight"), layers.get(f"layers.{number}.bias")
            if w is None or b is None or w.ndim != 2 or w.shape[1] != len(weight):
                raise UserError(f"reward 'aesthetic': layers.{number} of {source} does not fit: wrong file?")
            weight, bias = w.double() @ weight, w.double() @ bias + b.double()
        if len(weight) != 1:
            raise UserError(f"reward 'aesthetic': {source} gives {len(weight)} scores a picture, not one: wrong file?")
        return weight[0].float(), bias[0].float()


def _download(address: str) -> Path:
    """Path of the file at `address`, downloaded once into PyTorch's cache."""
    if not address.startswith("https://"):
        raise FileNotFoundError("no such file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1].replace("%2B", "+")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), progress=False)
    return path
