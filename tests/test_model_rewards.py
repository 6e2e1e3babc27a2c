"""Rewards that are neural networks: loading, image preparation, arithmetic, on small models in the published formats.

No trained weights are at hand, so self-tests are passed by models that are taught the golden pictures for a second.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt, load_prompts
from dgpo_fast.prompts.geneval import CLASSES, COLORS, TAGS
from dgpo_fast.rewards import clip as clip_module
from dgpo_fast.rewards import geneval, golden, hpsv2, imagereward, jpeg, load_rewards, models, ocr
from dgpo_fast.rewards.aesthetic import AestheticReward
from dgpo_fast.rewards.clip import Clip, ClipScoreReward, PickScoreReward
from dgpo_fast.rewards.device import on_device
from dgpo_fast.rewards.geneval import ColorJudge, Detector, GenevalReward, box_of, crop, read_out
from dgpo_fast.rewards.geneval_rules import THRESHOLD, Detection
from dgpo_fast.rewards.hpsv2 import HpsReward
from dgpo_fast.rewards.imagereward import ImageRewardReward
from dgpo_fast.rewards.ocr import OcrReward
from dgpo_fast.rewards.registry import BUILT_IN
from dgpo_fast.tiny import data, shapes
from dgpo_fast.tiny.shapes import ShapesReward
from tests import reward_models as small
from tests.reward_models import LETTERS

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One untrained model of every kind."""
    folder = tmp_path_factory.mktemp("models")
    small.save_clip(folder / "clip")
    small.save_mask2former(folder / "mask2former")
    small.save_bert_tokenizer(folder / "bert")
    torch.save(small.predictor_weights(), folder / "predictor.pth")
    torch.save(small.image_reward_weights(), folder / "BLIP.pt")
    half = {key: value.half() for key, value in small.open_clip_weights().items()}
    torch.save({"state_dict": half}, folder / "HPS.pt")
    return folder


UNTRAINED = {
    "clipscore": lambda folder: ClipScoreReward(folder / "clip"),
    "pickscore": lambda folder: PickScoreReward(folder / "clip", folder / "clip"),
    "aesthetic": lambda folder: AestheticReward(folder / "clip", folder / "predictor.pth"),
    "imagereward": lambda folder: ImageRewardReward(folder / "BLIP.pt", folder / "bert"),
    "hpsv2": lambda folder: HpsReward(folder / "HPS.pt", folder / "clip"),
    "geneval-hf": lambda folder: GenevalReward(folder / "mask2former", folder / "clip"),
}


@pytest.fixture(scope="module")
def untrained(folder):
    made = {name: make(folder) for name, make in UNTRAINED.items()}
    return made.__getitem__


# Image preparation


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


# GenEval's detector


def test_detector_reads_boxes_and_confidences_by_hand():
    classes = torch.zeros(3, 80)
    classes[0, 0], classes[0, 2], classes[0, 1] = 0.6, 0.35, 0.33
    classes[1, 16] = 0.95
    logits = torch.full((3, 8, 8), -2.0)
    logits[0, 2:5, 1:7] = 2.0
    logits[1, 4:, 4:] = 0.5
    logits[1, 7, 7] = 6.0
    found = read_out(classes, logits, ((8, 8), (8, 8), (8, 8)))
    # Three queries give the three most probable pairs. Person: 0.6 · sigmoid(2) = 0.5285; car: 0.35 · 0.8808 = 0.3083;
    # dog: 0.95 · (15 · sigmoid(0.5) + sigmoid(6)) / 16 = 0.95 · (15 · 0.62246 + 0.99753) / 16 = 0.6136.
    by_name = {one.name: one for one in found}
    assert set(by_name) == {"person", "car", "dog"}
    assert by_name["person"].confidence == pytest.approx(0.5285, abs=1e-4)
    assert by_name["car"].confidence == pytest.approx(0.3083, abs=1e-4)
    assert by_name["dog"].confidence == pytest.approx(0.6136, abs=1e-4)
    assert by_name["person"].box == by_name["car"].box == (1, 2, 7, 5)
    assert by_name["dog"].box == (4, 4, 8, 8)
    assert by_name["dog"].mask.dtype == bool and by_name["dog"].mask.sum() == 16
    # Just beyond the threshold as a class, below it with its mask.
    classes[:] = 0
    classes[0, 0] = 0.33
    assert read_out(classes, logits, ((8, 8), (8, 8), (8, 8))) == []


def test_an_empty_mask_is_no_object():
    classes = torch.zeros(2, 80)
    classes[0, 5] = 0.99
    assert read_out(classes, torch.full((2, 4, 4), -1.0), ((4, 4), (4, 4), (4, 4))) == []


def test_masks_are_cut_before_they_are_resized():
    classes = torch.zeros(1, 80)
    classes[0, 0] = 0.99
    logits = torch.full((1, 8, 8), -5.0)
    logits[0, :4, :2] = 5.0
    logits[0, :, 4:] = 5.0  # padding
    (person,) = read_out(classes, logits, ((8, 8), (8, 4), (16, 8)))
    # The left half of the input is the picture at half its size.
    assert person.box == (0, 0, 4, 8) and person.mask.shape == (16, 8) and person.mask.sum() == 32


def test_boxes_enclose_masks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((9, 13)) > 0.9
        mask[rng.integers(9), rng.integers(13)] = True
        points = [(x, y) for y in range(9) for x in range(13) if mask[y, x]]
        xs, ys = zip(*points, strict=True)
        assert box_of(mask) == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)


@pytest.mark.parametrize(
    ("size", "resized", "shape"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((512, 1024), (667, 1333), (672, 1344)),  # the longest side is bound by 1333
        ((1024, 768), (1067, 800), (1088, 800)),
    ],
)
def test_detectors_input(folder, size, resized, shape):
    images = np.full((1, *size, 3), (255, 0, 128), np.uint8)
    pixels, found = Detector(folder / "mask2former").prepare(images)
    assert found == resized and tuple(pixels.shape[-2:]) == shape
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(pixels[0, :, : resized[0], : resized[1]].mean((1, 2)), expected, rtol=1e-4)
    assert not pixels[0, :, resized[0] :].any() and not pixels[0, :, :, resized[1] :].any()


def test_detector_agrees_with_transformers_own_reading(folder):
    """At the one size that transformers' post-processing has, 384 pixels: the same objects, confidences and masks.

    It has no boxes; ours are those of its masks.
    """
    from transformers import Mask2FormerImageProcessor

    model = Detector(folder / "mask2former")._model
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = model(pixel_values=torch.randn(3, 3, 384, 384))
        # Untrained, it is sure of nothing.
        outputs.class_queries_logits, outputs.masks_queries_logits = (
            50 * outputs.class_queries_logits, 10 * outputs.masks_queries_logits
        )  # fmt: skip
        theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, return_binary_maps=True
        )
        classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
        ours = [read_out(*one, ((384, 384),) * 3) for one in zip(classes, outputs.masks_queries_logits, strict=True)]
    assert sum(map(len, ours)) > 5
    for found, other in zip(ours, theirs, strict=True):
        segments = zip(other["segments_info"], other["segmentation"].numpy() == 1, strict=True)
        expected = [(CLASSES[one["label_id"]], one["score"], mask) for one, mask in segments]
        assert len(found) == len(expected)
        mine, known = sorted(found, key=lambda one: one.confidence), sorted(expected, key=lambda one: one[1])
        for detection, (name, confidence, mask) in zip(mine, known, strict=True):
            assert detection.name == name and detection.confidence == pytest.approx(confidence, abs=2e-6)
            assert (detection.mask == mask).all() and detection.box == box_of(mask)


def test_detectors_input_is_that_of_transformers(folder):
    """Resized and normalised noise, to one of 256 levels. A square: others it stretches, where GenEval's are padded."""
    from transformers import Mask2FormerImageProcessor

    images = noise(1, 200, 200)
    pixels, _ = Detector(folder / "mask2former").prepare(images)
    theirs = Mask2FormerImageProcessor()(images=Image.fromarray(images[0]), return_tensors="pt")["pixel_values"]
    assert pixels.shape == theirs.shape
    assert (pixels - theirs).abs().max() < 1.01 / 255 / 0.224


def test_detector_finds_what_its_queries_say(folder, monkeypatch):
    """The whole path, with a network that answers a bus in the upper left quarter of the second of three pictures."""
    detector = Detector(folder / "mask2former", shortest_side=64)

    def answer(pixel_values):
        assert pixel_values.shape == (3, 3, 64, 96)
        logits = torch.zeros(3, 4, 81)
        logits[..., 80] = 20  # no object
        logits[1, 2, 5], logits[1, 2, 80] = 20, 0
        masks = torch.full((3, 4, 16, 24), -8.0)
        masks[:, :, :8, :12] = 8.0
        return type("Outputs", (), {"class_queries_logits": logits, "masks_queries_logits": masks})

    answer.device = "cpu"
    monkeypatch.setattr(detector, "_model", answer)
    first, second, third = detector.detect(noise(3, 128, 192))
    assert first == third == [] and [one.name for one in second] == ["bus"]
    assert second[0].confidence > 0.9 and second[0].box == (0, 0, 96, 64)


def test_untrained_detector_runs_at_full_size(untrained):
    graded, parts = untrained("geneval-hf")(
        noise(2, 512, 512), ["p"] * 2, [{"tag": "counting", "include": [{"class": "cat", "count": 2}]}] * 2
    )
    assert graded.tolist() == [0, 0] and set(parts) == {"correct", "strict"}


# GenEval's colours


def test_colour_crops_by_hand():
    image = noise(1, 6, 8)[0]
    mask = np.zeros((6, 8), bool)
    mask[2:5, 3:6] = True
    mask[3, 4] = False
    cut = crop(image, Detection("car", 1, (3, 2, 6, 5), mask))
    assert cut.shape == (3, 3, 3) and (cut[1, 1] == 0x99).all()
    assert (np.delete(cut.reshape(9, 3), 4, 0) == np.delete(image[2:5, 3:6].reshape(9, 3), 4, 0)).all()
    # The box may be wider than the mask.
    assert (crop(image, Detection("car", 1, (0, 0, 8, 6), mask))[0] == 0x99).all()


def test_colour_classifier_is_the_mean_of_three_templates(folder):
    judge = ColorJudge(folder / "clip")
    vectors = []
    for color in COLORS:
        texts = [f"a photo of a {color} car", f"a photo of a {color}-colored car", f"a photo of a {color} object"]
        mean = torch.stack([judge._clip.text_features([text])[0] for text in texts]).mean(0)
        vectors.append(mean / mean.norm())
    np.testing.assert_allclose(judge._classifier("car"), torch.stack(vectors), atol=1e-5)
    images = noise(4, 40, 40)
    cars = [Detection("car", 1, (0, 0, 40, 40), np.ones((40, 40), bool))] * 4
    features = judge._clip.features(images)
    expected = [COLORS[int((torch.stack(vectors) @ one).argmax())] for one in features]
    assert judge.name(list(zip(images, cars, strict=True))) == expected


class Scripted:
    """Stands for detector and colour judge: gives what it was told and notes what was asked."""

    def __init__(self, found: list[list[Detection]], colors: dict[tuple[str, float], str]) -> None:
        self.found, self.colors, self.asked = found, colors, []

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        return self.found

    def name(self, objects: list[tuple[np.ndarray, Detection]]) -> list[str]:
        self.asked += [(one.name, one.confidence, int(image[0, 0, 0])) for image, one in objects]
        return [self.colors[one.name, one.confidence] for _, one in objects]


def scripted(reward: GenevalReward, monkeypatch, found, colors) -> Scripted:
    script = Scripted(found, colors)
    monkeypatch.setattr(reward, "_detector", script)
    monkeypatch.setattr(reward, "_colors", script)
    return script


def at(name: str, confidence: float, x: float = 50) -> Detection:
    return Detection(name, confidence, (x - 10, 40, x + 10, 60), np.ones((2, 2), bool))


def test_geneval_from_detections_to_scores(untrained, monkeypatch):
    """A batch worked by hand: tags, thresholds, which colours are asked for, scores and parts."""
    found = [
        [at("clock", 0.95), at("clock", 0.85)],
        [at("clock", 0.95), at("clock", 0.85)],
        [at("cup", 0.8), at("car", 0.4), at("car", 0.31)],
        [at("cup", 0.8), at("car", 0.4)],
        [at("dog", 0.7, 80), at("tie", 0.6, 20)],
    ]
    colors = {("car", 0.4): "red", ("car", 0.31): "blue", ("cup", 0.8): "blue"}
    reward = untrained("geneval-hf")
    script = scripted(reward, monkeypatch, found, colors)
    two_clocks = {"include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}
    red_car = {"class": "car", "count": 1, "color": "red"}
    red_blue = {"tag": "color_attr", "include": [red_car, {"class": "cup", "count": 1, "color": "blue"}]}
    position = {"include": [{"class": "tie", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    metadata = [{"tag": "counting", **two_clocks}, two_clocks, red_blue, red_blue, {"tag": "position", **position}]
    images = np.arange(5, dtype=np.uint8).repeat(12).reshape(5, 2, 2, 3)
    graded, parts = reward(images, ["p"] * 5, metadata)
    # Beyond 0.9 there is one clock. Two cars: 0 for the count and for the colour, the cup's two terms are 1.
    np.testing.assert_allclose(graded, [1 / 2, 1, 2 / 4, 1, 1])
    assert graded.dtype == np.float32
    assert parts["correct"].tolist() == [0, 1, 1, 1, 1] and parts["strict"].tolist() == [0, 1, 0, 1, 1]
    # Colours are asked for where a colour is wanted, each with its own picture.
    assert script.asked == [("cup", 0.8, 2), ("car", 0.4, 2), ("car", 0.31, 2), ("cup", 0.8, 3), ("car", 0.4, 3)]


def test_colours_are_asked_for_only_where_they_matter(untrained, monkeypatch):
    reward = untrained("geneval-hf")
    script = scripted(reward, monkeypatch, [[at("car", 0.8), at("dog", 0.9)]], {})
    wanted = {"include": [{"class": "car", "count": 2, "color": "red"}, {"class": "dog", "count": 1}]}
    graded, _ = reward(np.zeros((1, 2, 2, 3), np.uint8), ["p"], [wanted])
    assert script.asked == [] and graded[0] == pytest.approx((1 / 2 + 0 + 1) / 3)


def test_geneval_compat(folder, monkeypatch):
    reward = GenevalReward(folder / "mask2former", folder / "clip", rule="compat")
    scripted(reward, monkeypatch, [[at("dog", 0.7, 20), at("tie", 0.6, 80)]], {})
    position = {"include": [{"class": "tie", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    assert reward(np.zeros((1, 2, 2, 3), np.uint8), ["p"], [position])[0] == pytest.approx([3 / 4])
    expected = "reward 'geneval-hf': no rule 'strict': use 'fixed' or 'compat'"
    assert message(GenevalReward, folder / "mask2former", folder / "clip", rule="strict") == expected
    made = []
    monkeypatch.setattr(geneval, "GenevalReward", lambda **settings: made.append(settings))
    geneval.compat()
    assert made == [{"rule": "compat"}]


def test_geneval_takes_its_own_prompts(untrained):
    sets = load_prompts("geneval", held_out=60)
    untrained("geneval-hf").check_prompts(sets.held_out + sets.train[:2000])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a cat"}', 'no list "include" of what to draw: write GenEval metadata such as {"prompt": "…"'),
        ('{"prompt": "a", "include": [{"class": "unicorn", "count": 1}]}',
         "reward 'geneval-hf' has no class 'unicorn': use one of COCO's 80 classes in GenEval's spelling"),
        ('{"prompt": "a", "include": [{"class": "mouse", "count": 1}]}',
         "reward 'geneval-hf' has no class 'mouse': use one of COCO's 80 classes in GenEval's spelling"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 1, "color": "teal"}]}',
         "reward 'geneval-hf' has no color 'teal': use one of red, orange, yellow, green, blue, purple, pink, brown, "
         "black, white"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": '
         '["inside", 0]}]}',
         "reward 'geneval-hf' has no position 'inside': use one of left of, right of, above, below"),
        ('{"prompt": "a", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "orc", "count": 1}]}',
         "reward 'geneval-hf' has no class 'orc': use one of COCO's 80 classes in GenEval's spelling"),
    ],
)  # fmt: skip
def test_bad_metadata_is_refused_with_its_line(untrained, tmp_path, line, problem):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "include": [{"class": "cat", "count": 1}]}\n' + line)
    prompts = load_prompts(str(tmp_path / "p.jsonl")).train
    reward = untrained("geneval-hf")
    assert message(reward.check_prompts, prompts).startswith(f"{tmp_path / 'p.jsonl'}:2: {problem}")
    bad = prompts[1]
    with pytest.raises(UserError):
        reward(np.zeros((1, 8, 8, 3), np.uint8), [bad.text], [bad.metadata])


@pytest.mark.parametrize(
    ("tag", "meant"),
    [
        ("Counting", "counting"), ("COUNTING", "counting"), (" counting", "counting"), ("countings", "counting"),
        ("single-object", "single_object"), ("Two objects", "two_object"), ("twoObject", "two_object"),
        ("color", "colors"), ("Colours", "colors"), ("positions", "position"), ("color-attr", "color_attr"),
        ("colors_attrs", "color_attr"),
    ],
)  # fmt: skip
def test_a_tag_that_is_nearly_genevals_is_refused_with_its_line(untrained, tmp_path, tag, meant):
    """Misspelt, `counting` would be scored by another threshold. The six themselves and tags of one's own are taken."""
    fine = [{"tag": one} for one in (*TAGS, "mine", "counting_hard", "objects", "")] + [{}]
    include = {"prompt": "a cat", "include": [{"class": "cat", "count": 1}]}
    lines = [json.dumps({**include, **more}) for more in (*fine, {"tag": tag})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    prompts = load_prompts(str(tmp_path / "p.jsonl")).train
    reward = untrained("geneval-hf")
    reward.check_prompts(prompts[:-1])
    problem = f"reward 'geneval-hf' has no tag {tag!r}: write {meant!r}, or name a tag of your own differently"
    assert message(reward.check_prompts, prompts) == f"{tmp_path / 'p.jsonl'}:{len(lines)}: {problem}"


# Self-tests


@pytest.mark.parametrize("name", UNTRAINED)
def test_random_weights_fail_the_self_test(untrained, name):
    assert message(untrained(name).self_test).startswith(f"reward {name!r} failed its self-test: ")


def taught_clip(clip: Clip) -> Clip:
    small.teach_clip(clip, clip.prepare(models.to_tensor(golden.squares())), GOLDEN, 0.05 + 0.2 * np.eye(4))
    return clip


def taught_cosine(folder: Path, make) -> object:
    reward = make(folder)
    taught_clip(reward._clip)
    return reward


def taught_aesthetic(folder: Path) -> AestheticReward:
    """A head that tells a photograph from noise and grey, fitted to the features of a CLIP that tells colours apart."""
    reward = UNTRAINED["aesthetic"](folder)
    taught_clip(reward._clip)
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
    "hpsv2": lambda folder: taught_cosine(folder, UNTRAINED["hpsv2"]),
    "aesthetic": taught_aesthetic,
    "imagereward": taught_imagereward,
    "geneval-hf": taught_geneval,
}


def swapped_shapes(monkeypatch, change) -> None:
    original = ShapesReward.detect
    monkeypatch.setattr(ShapesReward, "detect", lambda self, images: original(self, change(images)))


def swapped_ocr(monkeypatch, change) -> None:
    original = ocr.as_engine_wants
    monkeypatch.setattr(ocr, "as_engine_wants", lambda image: original(change(image)))


def swapped_jpeg(monkeypatch, change) -> None:
    original = jpeg._jpeg_bytes
    monkeypatch.setattr(jpeg, "_jpeg_bytes", lambda image: original(np.ascontiguousarray(change(image))))


def wrong_shapes(monkeypatch) -> None:
    original = shapes._templates
    monkeypatch.setattr(shapes, "_templates", lambda: (original()[0], original()[1][::-1]))


def wrong_ocr(monkeypatch) -> None:
    monkeypatch.setattr(OcrReward, "_read_one", lambda self, image: (("Golden 4Z",), (0.9,)))


def wrong_jpeg(monkeypatch) -> None:
    monkeypatch.setattr(jpeg, "_jpeg_bytes", lambda image: 1000)


# Rewards without weights of their own: how their pictures go astray, and what stands for the wrong model.
WEIGHTLESS = {
    "shapes": (swapped_shapes, wrong_shapes),
    "ocr": (swapped_ocr, wrong_ocr),
    "jpeg": (swapped_jpeg, wrong_jpeg),
}


def test_every_shipped_reward_is_proved_to_test_itself():
    """Those below and `geneval-hf-compat`, which is `geneval-hf` with another rule."""
    assert {*TAUGHT, *WEIGHTLESS, "geneval-hf-compat"} == set(BUILT_IN)


def people(count: int) -> np.ndarray:
    """The portrait, a little darker each time, and grey in its place as every third, uint8 (count, H, W, 3)."""
    photo, grey = golden.photo()[0], golden.grey()[0]
    return np.stack([grey if i % 3 == 1 else (photo * (1 - i / (10 * count))).astype(np.uint8) for i in range(count)])


@pytest.mark.parametrize("name", [*UNTRAINED, *WEIGHTLESS])
def test_scores_do_not_depend_on_the_batch(folder, untrained, name):
    """Alone, together and backwards, to rounding, with more pictures and texts than one forward takes."""
    assert clip_module._CHUNK == imagereward._CHUNK == 64 and geneval._CHUNK == 8
    count, picked, metadata = 66, [0, 1, 62, 63, 64, 65], {}
    images = noise(count, 40, 48) // 2 + np.arange(count, dtype=np.uint8)[:, None, None, None]
    texts = [f"{LETTERS[i % 26]}{LETTERS[i // 26]} dog" for i in range(count)]
    if name == "geneval-hf":
        count, picked, metadata = 10, [0, 1, 6, 7, 8, 9], {"include": [{"class": "person", "count": 1, "color": "red"}]}
        images, texts = people(count), texts[:count]
    elif name == "ocr":
        count, picked = 5, [0, 1, 4]
        images, texts = np.stack([ocr._printed(f"Bus {i}") for i in range(count)]), ['"Bus 1"'] * count
    elif name == "shapes":
        metadata = {"include": [{"class": "star", "count": 1}]}
        rng = np.random.default_rng(0)
        drawn = [{"include": [{"class": "star", "count": 1 + i % 3}]} for i in range(count)]
        images = np.stack([data.render(one, rng) for one in drawn])
    reward = untrained(name) if name in UNTRAINED else load_rewards([name]).rewards[name]
    if name == "geneval-hf":
        reward = UNTRAINED[name](folder)
        reward._detector = taught_detector(folder)

    def scored(rows: list[int]) -> dict[str, np.ndarray]:
        answer = reward(images[rows], [texts[row] for row in rows], [metadata] * len(rows))
        scores, parts = answer if isinstance(answer, tuple) else (answer, {})
        return {"score": np.asarray(scores), **parts}

    together, backwards = scored(list(range(count))), scored(list(range(count))[::-1])
    alone = [scored([row]) for row in picked]
    assert together["score"].std() > 0, "the pictures differ"
    for part, values in together.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(backwards[part][::-1], values, **tolerance)
        np.testing.assert_allclose([one[part][0] for one in alone], values[picked], **tolerance)


def test_detections_do_not_depend_on_the_batch(folder):
    """Ten pictures, of which the detector takes eight at a time: class, confidence and place of what is in each."""
    detector, pictures = taught_detector(folder), people(10)
    together = detector.detect(pictures)
    assert [len(found) for found in together[:2]] == [1, 0] and sum(map(len, together[8:])) > 0
    for picture, found in zip(pictures, together, strict=True):
        (alone,) = detector.detect(picture[None])
        assert [one.name for one in alone] == [one.name for one in found]
        for mine, other in zip(alone, found, strict=True):
            assert mine.confidence == pytest.approx(other.confidence, abs=1e-4)
            np.testing.assert_allclose(mine.box, other.box, atol=1)
            assert (mine.mask != other.mask).mean() < 1e-3


@pytest.mark.parametrize("name", [*WEIGHTLESS, "jpeg=-1"])
def test_self_tests_without_weights_see_swapped_channels_wrong_ranges_and_wrong_models(monkeypatch, name):
    load_rewards([name])
    swapped, wrong = WEIGHTLESS[name.split("=")[0]]
    failed = f"reward {name.split('=')[0]!r} failed its self-test: "
    for change in (lambda pixels: pixels[..., ::-1], lambda pixels: pixels // 255):
        with monkeypatch.context() as patch:
            swapped(patch, change)
            assert message(load_rewards, [name]).startswith(failed)
    wrong(monkeypatch)
    assert message(load_rewards, [name]).startswith(failed)


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_images_of_another_range_are_refused(name):
    """Floats in 0..1 would be black pictures to each of them."""
    expected = f"reward {name!r}: images must be uint8 RGB (B, H, W, 3), not float32 (1, 64, 64, 3)"
    images = np.ones((1, 64, 64, 3), np.float32)
    assert message(load_rewards([name]).rewards[name], images, ['"a"'], [{}]) == expected


@pytest.mark.parametrize("name", TAUGHT)
def test_self_test_passes_the_right_model_and_fails_what_is_swapped(folder, monkeypatch, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = TAUGHT[name](folder)
    reward.self_test()
    original = models.to_tensor
    failed = f"reward {name!r} failed its self-test: "
    monkeypatch.setattr(models, "to_tensor", lambda *given: original(*given).flip(1))
    assert message(reward.self_test).startswith(failed)
    monkeypatch.setattr(models, "to_tensor", lambda *given: original(*given) / 255)
    assert message(reward.self_test).startswith(failed)


@pytest.mark.parametrize("change", [lambda images: images[..., ::-1], lambda images: images // 255])
def test_self_test_sees_what_goes_astray_before_the_detector_alone(untrained, monkeypatch, change):
    """And another model's mean of the channels, which a person on a portrait may survive."""
    reward = untrained("geneval-hf")
    detector, prepare = reward._detector, reward._detector.prepare
    detector.self_test()
    failed = "reward 'geneval-hf' failed its self-test: a red square reaches the detector as "
    with monkeypatch.context() as patch:
        patch.setattr(detector, "prepare", lambda images: prepare(change(images)))
        assert message(reward.self_test).startswith(failed)
    monkeypatch.setattr(geneval, "_MEAN", (0.48145466, 0.4578275, 0.40821073))
    assert message(reward.self_test).startswith(failed)


@pytest.mark.parametrize(
    ("kind", "found"), [("labels shifted", "cat"), ("unsure", "nothing"), ("untrained", "nothing"), ("dark", "nothing")]
)
def test_self_test_sees_a_wrong_network(folder, monkeypatch, kind, found):
    """What the network itself answers, with its input's colours in order, or in a wrong range that nobody looked at."""
    reward = UNTRAINED["geneval-hf"](folder)
    untaught, reward._detector = reward._detector, taught_detector(folder)
    assert "squares are called " in message(reward.self_test), "past the detector, the untrained CLIP fails"
    detector, head = reward._detector, reward._detector._model.class_predictor
    if kind == "labels shifted":
        cat = CLASSES.index("cat")
        order = [cat, *range(1, cat), 0, *range(cat + 1, len(CLASSES) + 1)]
        head.weight.data, head.bias.data = head.weight[order], head.bias[order]
    elif kind == "unsure":
        head.weight.data *= 0.5
    elif kind == "untrained":
        reward._detector = untaught
    else:
        prepare = detector.prepare
        monkeypatch.setattr(detector, "self_test", lambda: None)
        monkeypatch.setattr(detector, "prepare", lambda images: prepare(images // 255))
    seen = f"found {found} on a portrait and nothing on plain grey"
    assert message(reward.self_test) == f"reward 'geneval-hf' failed its self-test: {seen}: wrong detector?"


@pytest.mark.parametrize("change", [lambda pixels: pixels.flip(1), lambda pixels: pixels / 255])
def test_self_test_sees_what_goes_astray_before_the_clip_of_colours_alone(folder, monkeypatch, change):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = TAUGHT["geneval-hf"](folder)
    prepare = reward._colors._clip.prepare
    monkeypatch.setattr(reward._colors._clip, "prepare", lambda pixels: prepare(change(pixels)))
    assert "squares are called " in message(reward.self_test)


@pytest.mark.parametrize(("portrait", "colors"), [(1.5, 0.0), (0.2, 1.0)])
def test_imagereward_must_pass_both_of_its_self_tests(folder, portrait, colors):
    """One margin is missed at a time: a portrait must lead by 1, the two squares by 0.2 in all."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = message(taught_imagereward(folder, portrait, colors).self_test)
    found = re.search(r"right descriptions lead by (\S+) \(a portrait\) and (\S+) \(colours\): wrong weights", text)
    assert found and (float(found[1]) > 1, float(found[2]) > 0.2) == (portrait > 0.5, colors > 0.1)


@pytest.fixture(scope="module")
def right_aesthetic(folder) -> AestheticReward:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return taught_aesthetic(folder)


@pytest.mark.parametrize(
    ("scores", "seen"),
    [
        ([5.0, 5.0, 5.0], "a portrait scores 5.00, noise 5.00 and plain grey 5.00"),  # 5 whatever it is shown
        ([5.0, 5.1, 4.0], "a portrait scores 5.00, noise 5.10 and plain grey 4.00"),
        ([5.0, 4.0, 4.9], "a portrait scores 5.00, noise 4.00 and plain grey 4.90"),
        ([0.55, 0.4, 0.45], "a portrait scores 0.55, not between 3 and 8"),  # 0 to 1 in place of 1 to 10
        ([55.0, 40.0, 45.0], "a portrait scores 55.00, not between 3 and 8"),
    ],
)
def test_self_test_sees_a_wrong_predictor_on_the_right_clip(right_aesthetic, folder, scores, seen):
    right_aesthetic.self_test()
    pictures = np.concatenate([golden.photo(), golden.noise(), golden.grey()])
    head = right_aesthetic._weight, right_aesthetic._bias
    with_head(right_aesthetic, folder, small.teach_predictor(right_aesthetic._clip.features(pictures), scores))
    assert message(right_aesthetic.self_test) == f"reward 'aesthetic' failed its self-test: {seen}: wrong weights?"
    right_aesthetic._weight, right_aesthetic._bias = head


def test_self_test_sees_a_wrong_scale(folder):
    reward = TAUGHT["clipscore"](folder)
    reward._factor /= 7
    assert message(reward.self_test).endswith("wrong model?")


@pytest.mark.parametrize(
    ("found", "seen"),
    [
        ([[], []], "found nothing on a portrait and nothing on plain grey"),
        ([[at("cat", 0.95)], []], "found cat on a portrait and nothing on plain grey"),
        ([[at("person", 0.95)], []], "found person on a portrait and nothing on plain grey"),  # far too small
        (
            [[Detection("person", 0.95, (0, 0, 500, 600))] * 2, []],
            "found person, person on a portrait and nothing on plain grey",
        ),
        (
            [[Detection("person", 0.95, (0, 0, 500, 600))], [at("tv", 0.99)]],
            "found person on a portrait and tv on plain grey",
        ),
    ],
)
def test_self_test_sees_a_wrong_detector(untrained, monkeypatch, found, seen):
    reward = untrained("geneval-hf")
    monkeypatch.setattr(reward._detector, "detect", lambda images: found)
    expected = f"reward 'geneval-hf' failed its self-test: {seen}: wrong detector?"
    assert message(reward.self_test) == expected


# Loading


def test_the_documented_local_copy(folder, tmp_path, monkeypatch):
    """The function in docs/rewards.md, with the small model's folder in place of the page's; its self-test runs."""
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(from dgpo_fast.rewards.clip .*?)```", page, re.DOTALL)
    spec = re.search(r"--rewards (my_models:\S+?)`", page)
    assert block and spec
    (tmp_path / "my_models.py").write_text(re.sub(r'"/models/\S+?"', repr(str(folder / "clip")), block[1]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    assert message(load_rewards, [spec[1]]).startswith("reward 'pickscore' failed its self-test: ")


def test_the_published_files_have_the_published_sizes():
    """The configurations that are read off files of the real size, and the sizes that docs/rewards.md gives."""
    from transformers import (
        BlipTextModel,
        BlipVisionModel,
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    def millions(*networks: torch.nn.Module) -> int:
        return round(sum(p.numel() for network in networks for p in network.parameters()) / 1e6)

    with torch.device("meta"):
        weights = small.open_clip_weights(vision=(1280, 32, 257), text=(1024, 24, 77, 49408), projection=1024)
        config = hpsv2._config(weights)
        network = CLIPModel(config)
        renamed = hpsv2.rename(weights)
        assert {key: tuple(value.shape) for key, value in renamed.items()} == {
            key: tuple(value.shape) for key, value in network.named_parameters()
        }
        assert millions(network) == 986
        vision, text = config.vision_config, config.text_config
        assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 14)
        assert (text.num_attention_heads, text.eos_token_id) == (16, 49407)

        blip = imagereward._config(small.image_reward_weights((1024, 24, 197), (768, 12, 512, 30524)))
        vision, text = blip.vision_config, blip.text_config
        assert (vision.num_attention_heads, vision.image_size, text.num_attention_heads) == (16, 224, 12)
        assert millions(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)) == 445
        openai = CLIPConfig(
            projection_dim=768,
            text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            vision_config={
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "patch_size": 14,
            },
        )  # fmt: skip
        assert millions(CLIPModel(openai)) == 428
        swin = SwinConfig(
            embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        detector = Mask2FormerConfig(backbone_config=swin, num_labels=80)
        assert millions(Mask2FormerForUniversalSegmentation(detector)) == 69
    for published, found in (
        (hpsv2.PUBLISHED, config), (clip_module.PICKSCORE, config), (clip_module.OPENAI, openai),
        (imagereward.PUBLISHED, blip), (geneval.DETECTOR, detector),
    ):  # fmt: skip
        published.require("a", published.source, found)
    # Siblings: CLIP ViT-L/14 for ViT-H/14 and the reverse, L/14 for 336 pixels, and Mask2Former on Swin-T, -B and -L.
    large, clips = clip_module.OPENAI, "vision_config.hidden_size is"
    assert f"{clips} 1024 and not 1280" in message(hpsv2.PUBLISHED.require, "a", hpsv2.PUBLISHED.source, openai)
    assert f"{clips} 1280 and not 1024" in message(large.require, "a", large.source, config)
    openai.vision_config.image_size = 336
    assert "image_size is 336 and not 224" in message(large.require, "a", large.source, openai)
    for swin.embed_dim, swin.depths, seen in (
        (96, [2, 2, 6, 2], "depths is [2, 2, 6, 2] and not [2, 2, 18, 2]"),
        (128, [2, 2, 18, 2], "embed_dim is 128 and not 96"),
        (192, [2, 2, 18, 2], "embed_dim is 192 and not 96"),
    ):
        detector = Mask2FormerConfig(backbone_config=swin)
        assert seen in message(geneval.DETECTOR.require, "a", geneval.DETECTOR.source, detector)


PUBLISHED = {
    "clipscore": (ClipScoreReward, clip_module.OPENAI, "clip", "vision_config.patch_size is 8 and not 14"),
    "aesthetic": (AestheticReward, clip_module.OPENAI, "clip", "vision_config.patch_size is 8 and not 14"),
    "pickscore": (PickScoreReward, clip_module.PICKSCORE, "clip", "vision_config.patch_size is 8 and not 14"),
    "geneval-hf": (GenevalReward, geneval.DETECTOR, "mask2former", "backbone_config.embed_dim is 8 and not 96"),
    "hpsv2": (HpsReward, hpsv2.PUBLISHED, "HPS.pt", "vision_config.image_size is 56 and not 224"),
    "imagereward": (
        ImageRewardReward, imagereward.PUBLISHED, "BLIP.pt", "vision_config.hidden_size is 128 and not 1024"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTRAINED)
def test_another_model_under_the_published_name_is_refused(folder, tmp_path, monkeypatch, name):
    """By the name that is the default, here a folder in the working one, and by a copy that is named like it. Models
    of other names, as in all the tests here, are the user's own."""
    make, (published, _), file, seen = PUBLISHED[name]
    for place in (tmp_path / published, tmp_path / Path(published).name):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder / file)
    monkeypatch.chdir(tmp_path)
    remedy = "get that one, or give a model of your own another name (docs/rewards.md, models)"
    for given in ((), (tmp_path / Path(published).name,)):
        source = given[0] if given else published
        expected = f"reward {name!r}: {source} is not the published {published}, as its {seen}: {remedy}"
        assert message(make, *given) == expected


def test_models_that_cannot_be_had(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = tmp_path / "none"
    text = message(ClipScoreReward, missing)
    assert text.startswith(f"reward 'clipscore' needs {missing}, which cannot be loaded (")
    assert text.endswith("): check its path, or name a local copy (docs/rewards.md, models)")
    text = message(PickScoreReward, "nobody/none")
    assert text.startswith("reward 'pickscore' needs nobody/none, which cannot be loaded (")
    assert "`hf download nobody/none`" in text
    text = message(HpsReward, "nobody/none/file.pt", folder / "clip")
    assert "reward 'hpsv2' needs nobody/none/file.pt" in text and "`hf download nobody/none file.pt`" in text
    assert "needs" in message(ImageRewardReward, missing, folder / "bert")
    assert "needs" in message(AestheticReward, folder / "clip", missing)
    assert "needs" in message(GenevalReward, missing, folder / "clip")
    assert "needs" in message(GenevalReward, folder / "mask2former", missing)
    assert "needs" in message(PickScoreReward, folder / "clip", missing)


def test_models_of_another_kind(folder, tmp_path):
    text = message(Detector, small.save_mask2former(tmp_path / "stuff", labels=20))
    assert text.endswith("has not COCO's 80 classes in their order: wrong detector?")
    text = message(ClipScoreReward, folder / "mask2former")
    assert text.startswith("reward 'clipscore'")
    assert message(ImageRewardReward, folder / "HPS.pt", folder / "bert").endswith("wrong file?")
    assert message(HpsReward, folder / "BLIP.pt", folder / "clip").endswith("wrong file?")
    assert message(HpsReward, folder / "predictor.pth", folder / "clip").endswith("wrong file?")
    text = message(AestheticReward, folder / "clip", folder / "HPS.pt")
    assert text == f"reward 'aesthetic': layers.0 of {folder / 'HPS.pt'} does not fit: wrong file?"


def test_labels_in_another_order(folder, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "mask2former")
    model.config.id2label = {number: CLASSES[number - 1] for number in range(80)}
    model.save_pretrained(tmp_path / "shifted")
    assert "in their order" in message(Detector, tmp_path / "shifted")
    # Other names for some classes, as on the hub, do not matter.
    model.config.id2label = dict(enumerate(CLASSES)) | {3: "motorbike", 57: "sofa", 64: "mouse"}
    model.save_pretrained(tmp_path / "renamed")
    Detector(tmp_path / "renamed")


def test_incomplete_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    small.save_clip(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    lacking = "text_model.encoder.layers.1.mlp.fc1.weight"
    save_file({key: value for key, value in weights.items() if key != lacking}, file, metadata={"format": "pt"})
    expected = f"reward 'clipscore': {tmp_path / 'clip'} lacks 1 weights, {lacking} first: wrong model?"
    assert message(ClipScoreReward, tmp_path / "clip") == expected
    file.write_bytes(file.read_bytes()[:1000])
    assert message(ClipScoreReward, tmp_path / "clip").startswith("reward 'clipscore' needs")

    weights = small.image_reward_weights()
    del weights["blip.text_encoder.encoder.layer.1.output.dense.bias"]
    torch.save(weights, tmp_path / "ir.pt")
    expected = (
        f"reward 'imagereward': {tmp_path / 'ir.pt'} lacks the weight encoder.layer.1.output.dense.bias: wrong file?"
    )
    assert message(ImageRewardReward, tmp_path / "ir.pt", folder / "bert") == expected
    weights = small.open_clip_weights()
    weights["visual.proj"] = weights["visual.proj"][:, :50]
    torch.save(weights, tmp_path / "hps.pt")
    text = message(HpsReward, tmp_path / "hps.pt", folder / "clip")
    assert text.endswith("the weight visual_projection.weight is (50, 160) instead of (96, 160): wrong file?")


def test_files_that_are_no_weights(folder, tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    expected = f"reward 'hpsv2': {tmp_path / 'list.pt'} is no file of PyTorch weights"
    assert message(HpsReward, tmp_path / "list.pt", folder / "clip") == expected
    (tmp_path / "page.pt").write_text("<html>404</html>")
    assert message(HpsReward, tmp_path / "page.pt", folder / "clip").startswith("reward 'hpsv2' needs")


class Malicious:
    def __reduce__(self):
        return (print, ("code from a weights file",))


def test_weights_run_no_code(folder, tmp_path, capsys):
    torch.save({"weight": Malicious()}, tmp_path / "evil.pt")
    assert message(HpsReward, tmp_path / "evil.pt", folder / "clip").startswith("reward 'hpsv2' needs")
    assert "code from" not in capsys.readouterr().out


def test_no_gradients_and_no_random_layers(untrained):
    for name in ("clipscore", "hpsv2"):
        network = untrained(name)._clip.model
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    reward = untrained("imagereward")
    for network in (reward._vision, reward._text, reward._head, untrained("geneval-hf")._detector._model):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_importing_rewards_is_light():
    code = (
        "import sys, dgpo_fast.rewards, dgpo_fast.rewards.registry; "
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_group_through_the_weighted_sum(folder, untrained):
    from dgpo_fast.rewards import WeightedReward

    both = WeightedReward(
        {"clipscore": untrained("clipscore"), "hpsv2": untrained("hpsv2")}, {"clipscore": 1, "hpsv2": 2}
    )
    scores = both.score_groups(noise(4, 64, 64), [Prompt("a cat"), Prompt("a dog")], 2)
    assert scores.valid.all() and not scores.failures
    np.testing.assert_allclose(scores.rewards, scores.parts["clipscore"] + 2 * scores.parts["hpsv2"], rtol=1e-5)


@pytest.mark.parametrize("name", TAUGHT)
def test_models_stay_on_the_device_that_they_were_loaded_for(folder, monkeypatch, name):
    """Whatever this process's current device is later, as where the trainer moves on to a GPU of its own."""
    with on_device(torch.device("cpu")):
        reward = TAUGHT[name](folder)
    monkeypatch.setattr(models, "default_device", lambda: torch.device("meta"))
    images = np.repeat(golden.photo(), 2, axis=0)
    person = {"include": [{"class": "person", "count": 1, "color": "red"}]}
    scores = reward(images, ["a photo of a person"] * 2, [person] * 2)
    scores = scores[0] if isinstance(scores, tuple) else scores
    assert np.isfinite(scores).all()


def test_rewards_are_loaded_on_the_device_that_is_named(folder):
    """`load_rewards(…, device)` decides where a model goes, not the GPUs of the machine."""
    with on_device(torch.device("meta")):
        assert models.default_device().type == "meta"
    assert models.default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
