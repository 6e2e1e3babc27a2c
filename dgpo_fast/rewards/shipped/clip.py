"""CLIP as an engine for rewards: features of images and texts, and the rewards that are their cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt
from dgpo_fast.prompts.unread import Reader, tokenizing, unread_ends
from dgpo_fast.records import Metadata
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.protocol import require_images
from dgpo_fast.rewards.shipped import models

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

_AT_224 = {"vision_config.patch_size": 14, "vision_config.image_size": 224}
VIT_L_14 = _AT_224 | {
    "vision_config.hidden_size": 1024,
    "vision_config.num_hidden_layers": 24,
    "text_config.hidden_size": 768,
    "text_config.num_hidden_layers": 12,
    "projection_dim": 768,
}
VIT_H_14 = _AT_224 | {
    "vision_config.hidden_size": 1280,
    "vision_config.num_hidden_layers": 32,
    "text_config.hidden_size": 1024,
    "text_config.num_hidden_layers": 24,
    "projection_dim": 1024,
}
OPENAI = models.Published("openai/clip-vit-large-patch14", VIT_L_14)
PICKSCORE = models.Published("yuvalkirstain/PickScore_v1", VIT_H_14)
_CHUNK = 64  # images or texts per forward


class Clip:
    """A CLIP of transformers with its tokenizer, in fp32, without gradients.

    Attributes:
        model: a `CLIPModel`.
        scale: exp(logit_scale), 100 in all published models.
        reader: how much it reads of a text, 77 tokens in all published models.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        square: Callable[[torch.Tensor, int], torch.Tensor] = models.crop_square,
    ) -> None:
        """`square` makes images square: `models.crop_square` or `models.pad_square`."""
        self.model, self._tokenizer, self._square = model, tokenizer, square
        self.scale = float(model.logit_scale.exp())
        self._size = model.config.vision_config.image_size
        self.reader = Reader("CLIP", model.config.text_config.max_position_embeddings, tokenizing(tokenizer))

    @classmethod
    def load(
        cls, name: str, published: models.Published, model: str | Path, tokenizer: str | Path | None = None
    ) -> Clip:
        """Loads a model and its tokenizer (by default the model's own) by hub name or folder, for the reward `name`.

        Raises UserError if one of the two is not available, or a model under the name of `published` is another one.
        """
        from transformers import AutoTokenizer, CLIPModel

        loaded = models.load_pretrained(name, CLIPModel.from_pretrained, model)
        published.require(name, model, loaded.config)
        return cls(loaded, models.load_pretrained(name, AutoTokenizer.from_pretrained, tokenizer or model))

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in 0..255 as inputs of the model, (B, 3, S, S)."""
        return models.normalise(self._square(pixels, self._size), models.CLIP_MEAN, models.CLIP_STD)

    @torch.inference_mode()
    def image_features(self, prepared: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, D) of prepared images (B, 3, S, S)."""
        chunks = [self.model.get_image_features(pixel_values=chunk).pooler_output for chunk in prepared.split(_CHUNK)]
        return F.normalize(torch.cat(chunks), dim=-1)

    def features(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors (B, D) of uint8 images (B, H, W, 3), B ≥ 1."""
        chunks = (images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK))
        prepared = [self.prepare(models.to_tensor(chunk, self.model.device)) for chunk in chunks]
        return self.image_features(torch.cat(prepared))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (B, D) of texts, cut at the model's length (77 tokens); each distinct text is read once."""
        distinct = list(dict.fromkeys(texts))
        found = []
        for start in range(0, len(distinct), _CHUNK):
            tokens = self._tokenizer(
                distinct[start : start + _CHUNK],
                padding="max_length",
                truncation=True,
                max_length=self.reader.limit,
                return_tensors="pt",
            ).to(self.model.device)
            outputs = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            found.append(outputs.pooler_output)
        row = {text: index for index, text in enumerate(distinct)}
        return F.normalize(torch.cat(found), dim=-1)[[row[text] for text in texts]]

    def self_test(self, name: str) -> None:
        """Raises UserError unless squares in four colours and their descriptions match, both ways.

        Wrong weights, swapped channels, and images in another range fail this test.
        """
        cosines = (self.features(golden.squares()) @ self.text_features(golden.TEXTS).T).cpu().numpy()
        colors = list(golden.COLORS)
        for axis, what in ((1, "text for the picture of"), (0, "picture for")):
            chosen = [colors[index] for index in cosines.argmax(axis)]
            if chosen != colors:
                wrong = next(i for i, color in enumerate(colors) if chosen[i] != color)
                seen = f"the best {what} a {colors[wrong]} square is the {chosen[wrong]} one"
                raise UserError(f"reward {name!r} failed its self-test: {seen}: wrong model or tokenizer?")


class CosineReward:
    """factor · cos(image, text): `CLIPScore`, `PickScore` and `HPSv2.1` differ in the model and in the factor alone."""

    independent_images = True
    metadata_keys = ()

    def __init__(self, name: str, clip: Clip, factor: float, expected: tuple[float, float]) -> None:
        """
        Args:
            name: the reward, for messages.
            factor: what the cosine is multiplied by.
            expected: bounds that hold for the score of any picture that shows what its prompt says.
        """
        self._name, self._clip, self._factor, self._expected = name, clip, factor, expected

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores float32 (B,) of uint8 images (B, H, W, 3), and the part `cosine`, float32 (B,), unscaled.

        Raises:
            UserError: images of another type or shape.
        """
        require_images(self._name, images)
        if not len(images):
            return np.zeros(0, np.float32), {"cosine": np.zeros(0, np.float32)}
        cosine = (self._clip.features(images) * self._clip.text_features(prompts)).sum(-1).cpu().numpy()
        return self._factor * cosine, {"cosine": cosine}

    def check_prompts(self, prompts: Sequence[Prompt]) -> str | None:
        """A line on prompts that are longer than the model reads; None if there are none."""
        return unread_ends((prompt.text for prompt in prompts), [self._clip.reader])

    def self_test(self) -> None:
        """Raises UserError unless coloured squares and their descriptions match, on the scale that is expected."""
        self._clip.self_test(self._name)
        scores, _ = self(golden.squares(), golden.TEXTS, [{}] * len(golden.TEXTS))
        low, high = self._expected
        if not (low < scores.min() and scores.max() < high):
            seen = f"right descriptions score {scores.min():.3f} to {scores.max():.3f}, not {low} to {high}"
            raise UserError(f"reward {self._name!r} failed its self-test: {seen}: wrong model?")


class ClipScoreReward(CosineReward):
    """CLIPScore: 100 · cosine / `divisor`, by OpenAI's CLIP ViT-L/14. About 0.5 to 1.2 with DGPO's divisor of 30."""

    def __init__(self, model: str | Path = OPENAI.source, *, divisor: float = 30.0) -> None:
        """
        Args:
            model: hub name or folder.
            divisor: 30 as DGPO trains, 100 as DiffusionNFT does.

        Raises:
            UserError: the model is not available, or is another one under the published name.
        """
        clip = Clip.load("clipscore", OPENAI, model)
        super().__init__("clipscore", clip, clip.scale / divisor, (10 / divisor, 45 / divisor))


class PickScoreReward(CosineReward):
    """PickScore (Kirstain et al. 2023), a CLIP ViT-H/14 tuned to people's choices: 100 · cosine / `divisor`.

    The part `raw`, 100 · cosine, is what papers print: 20 to 24 for good pictures.
    """

    def __init__(
        self,
        model: str | Path = PICKSCORE.source,
        tokenizer: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        divisor: float = 26.0,
    ) -> None:
        """
        Args:
            model: hub name or folder.
            tokenizer: hub name or folder.
            divisor: 26 as Flow-GRPO and DGPO train.

        Raises:
            UserError: one of the two is not available, or is another one under the published name.
        """
        clip = Clip.load("pickscore", PICKSCORE, model, tokenizer)
        super().__init__("pickscore", clip, clip.scale / divisor, (5 / divisor, 45 / divisor))

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `CosineReward`, with one part more: `raw`, float32 (B,)."""
        scores, parts = super().__call__(images, prompts, metadata)
        return scores, {**parts, "raw": self._clip.scale * parts["cosine"]}
