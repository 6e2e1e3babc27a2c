"""Rewards that are neural networks: image preparation and arithmetic, on small models in the published formats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dgpo_fast.rewards.shipped import models
from dgpo_fast.rewards.shipped.clip import ClipScoreReward
from tests.model_rewards import models as small
from tests.model_rewards.cases import EMPTY, UNTRAINED, message, noise, prepared


@pytest.mark.parametrize("size", [(512, 512), (300, 200), (33, 64), (24, 24), (224, 224)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizing_is_pils(size, mode):
    # PIL also rounds and clips between the two directions, which pictures of middling contrast hardly show.
    images = 64 + noise(2, *size) // 2
    resampling = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    expected = np.stack([np.asarray(Image.fromarray(i).resize((50, 70), resampling)) for i in images]).astype(int)
    found = models.resize(models.to_tensor(images), (70, 50), mode).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() <= 1


def test_crop_square_keeps_the_middle():
    images = np.zeros((1, 40, 80, 3), np.uint8)
    images[:, :, 20:60] = (10, 20, 30)
    pixels = models.crop_square(models.to_tensor(images), 40)
    assert pixels.shape == (1, 3, 40, 40)
    assert torch.equal(pixels[0, :, 7, 9], torch.tensor([10.0, 20, 30])) and pixels.std((2, 3)).max() == 0
    assert models.crop_square(models.to_tensor(noise(1, 100, 37)), 32).shape == (1, 3, 32, 32)
    assert models.crop_square(models.to_tensor(noise(1, 8, 9)), 32).shape == (1, 3, 32, 32)


def test_pad_square_keeps_everything():
    images = np.full((1, 20, 40, 3), 200, np.uint8)
    pixels = models.pad_square(models.to_tensor(images), 20)
    # 20 × 40 becomes 10 × 20, with five black rows on either side.
    assert (pixels[0, :, 5:15] == 200).all() and pixels[0, :, :5].max() == pixels[0, :, 15:].max() == 0
    assert models.pad_square(models.to_tensor(noise(1, 31, 7)), 20).shape == (1, 3, 20, 20)


def test_normalising_by_hand():
    pixels = torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1)
    np.testing.assert_allclose(
        models.normalise(pixels, (0.5, 0.25, 0.5), (0.5, 0.5, 0.25)).ravel(), [-1, 0.5, 2], atol=1e-6
    )


# CLIP


def test_cosine_rewards_are_the_models_own_logits(folder, untrained):
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder / "clip"), AutoTokenizer.from_pretrained(folder / "clip")
    images, texts = noise(3, 32, 32), ["a cat", "two dogs on a sofa", "a cat"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=prepared(images), **tokens).logits_per_image.diagonal().numpy()
    assert np.ptp(logits) > 1e-3
    for name, divisor in (("clipscore", 30), ("pickscore", 26)):
        scores, parts = untrained(name)(images, texts, [{}] * 3)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, logits / divisor, rtol=1e-4)
        np.testing.assert_allclose(parts["cosine"], logits / 100, rtol=1e-4)
    np.testing.assert_allclose(parts["raw"], logits, rtol=1e-4, err_msg="PickScore as papers print it")
    rescaled, _ = ClipScoreReward(folder / "clip", divisor=100)(images, texts, [{}] * 3)
    np.testing.assert_allclose(rescaled, logits / 100, rtol=1e-4)


def test_long_prompts_are_cut(untrained):
    long = "a very long prompt " * 20
    scores, _ = untrained("clipscore")(noise(2, 32, 32), [long, long + "that goes on"], [{}] * 2)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", UNTRAINED)
def test_no_images(untrained, name):
    answer = untrained(name)(EMPTY, [], [])
    scores, parts = answer if isinstance(answer, tuple) else (answer, {})
    assert scores.shape == (0,) and all(part.shape == (0,) for part in parts.values())


@pytest.mark.parametrize("name", UNTRAINED)
@pytest.mark.parametrize(
    ("images", "what"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), "float32 (1, 8, 8, 3)"),
        (np.zeros((1, 3, 8, 8), np.uint8), "uint8 (1, 3, 8, 8)"),
        (np.zeros((8, 8, 3), np.uint8), "uint8 (8, 8, 3)"),
        (np.zeros((1, 0, 8, 3), np.uint8), "uint8 (1, 0, 8, 3)"),
        ([[0]], "list ()"),
    ],
)
def test_images_of_another_type_or_shape(untrained, name, images, what):
    expected = f"reward {name!r}: images must be uint8 RGB (B, H, W, 3), not {what}"
    assert message(untrained(name), images, ["a"], [{}]) == expected


# The aesthetic predictor


def test_aesthetic_is_the_five_layers_on_the_unit_feature(folder, untrained):
    images = noise(3, 32, 32)
    layers = small.predictor_weights()
    features = untrained("aesthetic")._clip.model.get_image_features(pixel_values=prepared(images)).pooler_output
    x = features / features.norm(dim=-1, keepdim=True)
    for number in (0, 2, 4, 6, 7):
        x = F.linear(x, layers[f"layers.{number}.weight"], layers[f"layers.{number}.bias"])
    scores = untrained("aesthetic")(images, [""] * 3, [{}] * 3)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, x[:, 0].detach(), rtol=1e-4, atol=1e-6)


# HPSv2.1


def test_hpsv2_is_open_clips_network(folder, untrained):
    images, texts = noise(3, 56, 56), ["a cat", "two dogs on a sofa", "z"]
    reward = untrained("hpsv2")
    tokens = reward._clip._tokenizer(
        texts, padding="max_length", max_length=small.CLIP_TOKENS, return_tensors="pt"
    ).input_ids
    weights = {key: value.half().float() for key, value in small.open_clip_weights().items()}
    seen, read = small.open_clip_features(weights, prepared(images), tokens)
    scores, _ = reward(images, texts, [{}] * 3)
    expected = (seen * read).sum(-1)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5)


def test_hpsv2_pads_instead_of_cutting(untrained):
    images = np.full((1, 56, 112, 3), 128, np.uint8)
    changed = images.copy()
    changed[:, :, :20] = 255
    scores = [untrained("hpsv2")(one, ["a"], [{}])[0] for one in (images, changed)]
    assert scores[0] != scores[1]
    # CLIPScore's crop leaves out the left and the right quarter.
    scores = [untrained("clipscore")(one, ["a"], [{}])[0] for one in (images, changed)]
    assert scores[0] == scores[1]


# ImageReward


def test_imagereward_is_blips_network(untrained):
    images = noise(3, 64, 64)
    texts = ["a cat", "two dogs on a sofa", "a prompt that is much longer than thirty five letters and is cut there"]
    reward = untrained("imagereward")
    tokens = reward._tokenizer(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 35) and tokens.attention_mask.sum(1).tolist()[2] == 35
    weights = small.image_reward_weights()
    expected = small.image_reward_score(weights, prepared(images), tokens.input_ids, tokens.attention_mask)
    scores = reward(images, texts, [{}] * 3)
    assert scores.dtype == np.float32 and expected.std() > 1e-5
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
