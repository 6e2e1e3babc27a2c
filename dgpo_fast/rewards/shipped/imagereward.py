"""The `imagereward` reward: ImageReward-v1.0 (Xu et al. 2023) on transformers' BLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt
from dgpo_fast.prompts.unread import Reader, tokenizing, unread_ends
from dgpo_fast.records import Metadata
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.protocol import require_images
from dgpo_fast.rewards.shipped import models

PUBLISHED = models.Published(
    "THUDM/ImageReward/ImageReward.pt",
    {
        "vision_config.hidden_size": 1024,
        "vision_config.num_hidden_layers": 24,
        "vision_config.image_size": 224,
        "vision_config.patch_size": 16,
        "text_config.hidden_size": 768,
        "text_config.num_hidden_layers": 12,
    },
)
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
_CHUNK = 64  # images per forward
_VISION_HEAD_WIDTH = _TEXT_HEAD_WIDTH = 64  # of BLIP-large and BERT-base; the weights show all other sizes

_VISION = {
    "visual_encoder.cls_token": "embeddings.class_embedding",
    "visual_encoder.pos_embed": "embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.": "embeddings.patch_embedding.",
    "visual_encoder.blocks.": "encoder.layers.",
    "visual_encoder.norm.": "post_layernorm.",
}
_VISION_LAYERS = {
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}


class ImageRewardReward:
    """How much people prefer a picture for its prompt, standardised: about −2 to 2.

    BLIP's text encoder reads the prompt (35 tokens at most) while attending to the picture (224 × 224); its first
    token's state goes through five linear layers, and the result x becomes (x − 0.16717) / 1.03334.
    """

    independent_images = True
    metadata_keys = ()

    def __init__(
        self, weights: str | Path = PUBLISHED.source, tokenizer: str | Path = "google-bert/bert-base-uncased"
    ) -> None:
        """
        Args:
            weights: `ImageReward.pt` on the hub (1.8 GB), or a local file.
            tokenizer: hub name or folder of BERT's uncased tokenizer.

        Raises:
            UserError: one of the two is not available, or the file is another model's.
        """
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        loaded = models.load_weights("imagereward", weights, lambda: models.hub_file(weights))
        try:
            config = _config(loaded)
        except (KeyError, ValueError) as error:
            raise UserError(f"reward 'imagereward': {weights} lacks {error}: wrong file?") from error
        PUBLISHED.require("imagereward", weights, config)
        self._vision = BlipVisionModel(config.vision_config)
        self._text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self._head = _head(loaded, config.text_config.hidden_size)
        models.fill("imagereward", weights, self._vision, _renamed_vision(loaded))
        models.fill("imagereward", weights, self._text, _below("blip.text_encoder.", loaded))
        models.fill("imagereward", weights, self._head, _below("mlp.layers.", loaded))
        self._size = config.vision_config.image_size
        self._tokenizer = models.load_pretrained("imagereward", AutoTokenizer.from_pretrained, tokenizer)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> np.ndarray:
        """Scores float32 (B,) of uint8 images (B, H, W, 3) for B prompts; metadata are not used.

        Raises:
            UserError: images of another type or shape.
        """
        require_images("imagereward", images)
        scores = [np.zeros(0, np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                pixels = models.to_tensor(images[chunk], self._vision.device)
                scores.append(self._score(pixels, prompts[chunk]).cpu().numpy())
        return np.concatenate(scores)

    def check_prompts(self, prompts: Sequence[Prompt]) -> str | None:
        """A line on prompts that are longer than the model reads; None if there are none."""
        reader = Reader("BERT", MAX_TOKENS, tokenizing(self._tokenizer))
        return unread_ends((prompt.text for prompt in prompts), [reader])

    def self_test(self) -> None:
        """Raises UserError unless a portrait, and red and blue squares, suit their descriptions by clear margins."""
        photo = np.repeat(golden.photo(), 2, axis=0)
        person, other = self(photo, ["a portrait photo of a woman in a navy uniform", "a photo of a red bus"], [{}] * 2)
        red, blue = golden.squares()[[0, 2]]
        texts = ["a red square", "a blue square", "a blue square", "a red square"]
        scores = self(np.stack([red, blue, red, blue]), texts, [{}] * 4)
        margins = float(person - other), float(scores[:2].sum() - scores[2:].sum())
        if not (margins[0] > 1 and margins[1] > 0.2):
            seen = f"right descriptions lead by {margins[0]:.2f} (a portrait) and {margins[1]:.2f} (colours)"
            raise UserError(f"reward 'imagereward' failed its self-test: {seen}: wrong weights or tokenizer?")

    def _score(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W) in 0..255."""
        prepared = models.normalise(models.crop_square(pixels, self._size), models.CLIP_MEAN, models.CLIP_STD)
        seen = self._vision(pixel_values=prepared).last_hidden_state
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(pixels.device)
        state = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state[:, 0]
        return (self._head(state)[:, 0] - MEAN) / STD


def _config(weights: Mapping[str, torch.Tensor]) -> SimpleNamespace:
    """`vision_config` and `text_config`, transformers' configurations of the two networks that `weights` are of."""
    from transformers import BlipTextConfig, BlipVisionConfig

    width, _, patch_size, _ = weights["blip.visual_encoder.patch_embed.proj.weight"].shape
    side = round((weights["blip.visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blip.visual_encoder.blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(key.endswith(".norm1.weight") for key in weights),
        num_attention_heads=width // _VISION_HEAD_WIDTH,
        image_size=side * patch_size,
        patch_size=patch_size,
        # BLIP's own value; transformers' default is another.
        layer_norm_eps=1e-6,
    )
    vocabulary, text_width = weights["blip.text_encoder.embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(weights["blip.text_encoder.encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=sum(key.endswith(".crossattention.self.query.bias") for key in weights),
        num_attention_heads=text_width // _TEXT_HEAD_WIDTH,
        max_position_embeddings=len(weights["blip.text_encoder.embeddings.position_embeddings.weight"]),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return SimpleNamespace(vision_config=vision, text_config=text)


def _renamed_vision(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BLIP's vision weights under transformers' names."""
    renamed = {}
    for key, value in _below("blip.", weights).items():
        old = next((prefix for prefix in _VISION if key.startswith(prefix)), None)
        if old is None:
            continue
        new = _VISION[old] + key.removeprefix(old)
        for before, after in _VISION_LAYERS.items():
            new = new.replace(before, after)
        renamed[new] = value
    return renamed


def _head(weights: Mapping[str, torch.Tensor], width: int) -> torch.nn.Sequential:
    """The linear layers, of the checkpoint's sizes, numbered as there: dropout in between, none active here."""
    sizes = {key.split(".")[0]: len(bias) for key, bias in _below("mlp.layers.", weights).items() if "bias" in key}
    head = torch.nn.Sequential()
    for number in sorted(sizes, key=int):
        head.add_module(number, torch.nn.Linear(width, sizes[number]))
        width = sizes[number]
    return head


def _below(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
