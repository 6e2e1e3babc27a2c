"""Small models of every reward, untrained and taught the golden pictures, and what tests ask of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.geneval import COLORS
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.shipped import geneval, models
from dgpo_fast.rewards.shipped.aesthetic import AestheticReward
from dgpo_fast.rewards.shipped.clip import Clip, ClipScoreReward, PickScoreReward
from dgpo_fast.rewards.shipped.geneval import Detector, GenevalReward, crop
from dgpo_fast.rewards.shipped.geneval_rules import Detection
from dgpo_fast.rewards.shipped.hpsv2 import HpsReward
from dgpo_fast.rewards.shipped.imagereward import ImageRewardReward
from tests.model_rewards import models as small

GOLDEN = list(golden.TEXTS)
EMPTY = np.zeros((0, 8, 8, 3), np.uint8)


def message(call, *arguments, **settings) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def prepared(images: np.ndarray) -> torch.Tensor:
    """uint8 images that need no resizing as CLIP and BLIP take them, channel by channel."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    channels = [(images[..., c] / 255.0 - mean[c]) / std[c] for c in range(3)]
    return torch.from_numpy(np.stack(channels, 1)).float()


UNTRAINED = {
    "clipscore": lambda folder: ClipScoreReward(folder / "clip"),
    "pickscore": lambda folder: PickScoreReward(folder / "clip", folder / "clip"),
    "aesthetic": lambda folder: AestheticReward(folder / "clip", folder / "predictor.pth"),
    "imagereward": lambda folder: ImageRewardReward(folder / "BLIP.pt", folder / "bert"),
    "hpsv2": lambda folder: HpsReward(folder / "HPS.pt", folder / "clip"),
    "geneval-hf": lambda folder: GenevalReward(folder / "mask2former", folder / "clip"),
}


def taught_clip(clip: Clip, folder: Path, name: str = "clip") -> Clip:
    """Taught once for all that start from the same weights, which `name` stands for."""
    learnt = folder / f"taught_{name}.pt"
    if not learnt.exists():
        small.teach_clip(clip, clip.prepare(models.to_tensor(golden.squares())), GOLDEN, 0.05 + 0.2 * np.eye(4))
        torch.save(clip.model.state_dict(), learnt)
    clip.model.load_state_dict(torch.load(learnt))
    return clip


def taught_cosine(folder: Path, make, clip: str = "clip") -> object:
    reward = make(folder)
    taught_clip(reward._clip, folder, clip)
    return reward


def taught_aesthetic(folder: Path) -> AestheticReward:
    """A head that tells a photograph from noise and grey, fitted to the features of a CLIP that tells colours apart."""
    reward = UNTRAINED["aesthetic"](folder)
    taught_clip(reward._clip, folder)
    pictures = np.concatenate([golden.photo(), golden.noise(), golden.grey()])
    with_head(reward, folder, small.teach_predictor(reward._clip.features(pictures), [5.5, 4.0, 4.5]))
    return reward


def with_head(reward: AestheticReward, folder: Path, layers: small.Weights) -> None:
    """Gives `reward` the predictor that AestheticReward reads from a file of these layers, and leaves its CLIP."""
    torch.save(layers, folder / "head.pth")
    loaded = AestheticReward(folder / "clip", folder / "head.pth")
    reward._weight, reward._bias = loaded._weight, loaded._bias


def taught_imagereward(folder: Path, portrait: float = 1.5, colors: float = 1.0) -> ImageRewardReward:
    """The scores of right descriptions of the portrait and of squares; wrong ones get their opposites."""
    reward = UNTRAINED["imagereward"](folder)
    photo = models.crop_square(models.to_tensor(golden.photo()), 64)
    red, blue = models.crop_square(models.to_tensor(golden.squares()[[0, 2]]), 64)
    pixels = torch.stack([photo[0], photo[0], red, blue, red, blue])
    texts = ["a portrait photo of a woman in a navy uniform", "a photo of a red bus"]
    texts += ["a red square", "a blue square", "a blue square", "a red square"]
    scores = [portrait, -portrait, colors, colors, -colors, -colors]
    small.teach_image_reward(reward, pixels, texts, scores)
    return reward


def taught_detector(folder: Path) -> Detector:
    """Taught once, at 64 pixels instead of 800: it sees a person on the portrait and nothing on grey or black."""
    if not (folder / "taught_mask2former").exists():
        detector = Detector(folder / "mask2former", shortest_side=64)
        plain = np.concatenate([golden.grey(), np.zeros_like(golden.grey())])
        small.teach_detector(detector, detector.prepare(np.concatenate([golden.photo(), plain]))[0])
        detector._model.save_pretrained(folder / "taught_mask2former")
    return Detector(folder / "taught_mask2former", shortest_side=64)


def taught_geneval(folder: Path) -> GenevalReward:
    reward = UNTRAINED["geneval-hf"](folder)
    reward._detector = taught_detector(folder)
    squares = golden.squares()
    mask = (squares != squares[:, :1, :1]).any(-1)[0]
    crops = np.stack([crop(one, Detection("square", 1, (0, 0, 256, 256), mask)) for one in squares])
    texts = [template.format(color=c, name="square") for c in COLORS for template in geneval._TEMPLATES]
    cosines = np.array([[0.3 * (c == color) for c in COLORS for _ in range(3)] for color in golden.COLORS])
    clip = reward._colors._clip
    small.teach_clip(clip, clip.prepare(models.to_tensor(crops)), texts, cosines, steps=150)
    return reward


TAUGHT = {
    "clipscore": lambda folder: taught_cosine(folder, UNTRAINED["clipscore"]),
    "pickscore": lambda folder: taught_cosine(folder, UNTRAINED["pickscore"]),
    "hpsv2": lambda folder: taught_cosine(folder, UNTRAINED["hpsv2"], "HPS"),
    "aesthetic": taught_aesthetic,
    "imagereward": taught_imagereward,
    "geneval-hf": taught_geneval,
}


def at(name: str, confidence: float, x: float = 50) -> Detection:
    return Detection(name, confidence, (x - 10, 40, x + 10, 60), np.ones((2, 2), bool))


def people(count: int) -> np.ndarray:
    """The portrait, a little darker each time, and grey in its place as every third, uint8 (count, H, W, 3)."""
    photo, grey = golden.photo()[0], golden.grey()[0]
    return np.stack([grey if i % 3 == 1 else (photo * (1 - i / (10 * count))).astype(np.uint8) for i in range(count)])
