"""Self-tests at the start: they pass the right model and see the wrong one, swapped channels and wrong ranges.

No trained weights are at hand, so they are passed by models that are taught the golden pictures for a second.
"""

import re

import numpy as np
import pytest
import torch

from dgpo_fast.prompts.geneval import CLASSES
from dgpo_fast.rewards import golden, load_rewards
from dgpo_fast.rewards.registry import BUILT_IN
from dgpo_fast.rewards.shipped import clip as clip_module
from dgpo_fast.rewards.shipped import geneval, imagereward, jpeg, models, ocr, pixels
from dgpo_fast.rewards.shipped.geneval_rules import Detection
from dgpo_fast.rewards.shipped.ocr import OcrReward
from dgpo_fast.tiny import data, shapes
from dgpo_fast.tiny.shapes import ShapesReward
from tests.model_rewards import models as small
from tests.model_rewards.cases import (
    TAUGHT,
    UNTRAINED,
    at,
    message,
    noise,
    people,
    taught_detector,
    taught_imagereward,
    with_head,
)
from tests.model_rewards.models import LETTERS


@pytest.mark.parametrize("name", UNTRAINED)
def test_random_weights_fail_the_self_test(untrained, name):
    assert message(untrained(name).self_test).startswith(f"reward {name!r} failed its self-test: ")


def swapped_shapes(monkeypatch, change) -> None:
    original = ShapesReward.detect
    monkeypatch.setattr(ShapesReward, "detect", lambda self, images: original(self, change(images)))


def swapped_ocr(monkeypatch, change) -> None:
    original = ocr.as_engine_wants
    monkeypatch.setattr(ocr, "as_engine_wants", lambda image: original(change(image)))


def swapped_jpeg(monkeypatch, change) -> None:
    original = jpeg._jpeg_bytes
    monkeypatch.setattr(jpeg, "_jpeg_bytes", lambda image: original(np.ascontiguousarray(change(image))))


def swapped_pixels(monkeypatch, change) -> None:
    original = pixels.luma
    monkeypatch.setattr(pixels, "luma", lambda images: original(change(images)))


def wrong_shapes(monkeypatch) -> None:
    original = shapes._templates
    monkeypatch.setattr(shapes, "_templates", lambda: (original()[0], original()[1][::-1]))


def wrong_ocr(monkeypatch) -> None:
    monkeypatch.setattr(OcrReward, "_read_one", lambda self, image: (("Golden 4Z",), (0.9,)))


def wrong_jpeg(monkeypatch) -> None:
    monkeypatch.setattr(jpeg, "_jpeg_bytes", lambda image: 1000)


def wrong_pixels(monkeypatch) -> None:
    monkeypatch.setattr(pixels, "luma", lambda images: images.mean(-1) / 255)


# Rewards without weights of their own: how their pictures go astray, and what stands for the wrong model.
WEIGHTLESS = {
    "shapes": (swapped_shapes, wrong_shapes),
    "ocr": (swapped_ocr, wrong_ocr),
    "jpeg": (swapped_jpeg, wrong_jpeg),
    "pixels": (swapped_pixels, wrong_pixels),
}


def test_every_shipped_reward_is_proved_to_test_itself():
    """Those below and `geneval-hf-compat`, which is `geneval-hf` with another rule."""
    assert {*TAUGHT, *WEIGHTLESS, "geneval-hf-compat"} == set(BUILT_IN)


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
def test_self_test_passes_the_right_model_and_fails_what_is_swapped(taught, monkeypatch, name):
    reward = taught(name)
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
def test_self_test_sees_what_goes_astray_before_the_clip_of_colours_alone(taught, monkeypatch, change):
    reward = taught("geneval-hf")
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
def test_self_test_sees_a_wrong_predictor_on_the_right_clip(taught, folder, scores, seen):
    right_aesthetic = taught("aesthetic")
    right_aesthetic.self_test()
    pictures = np.concatenate([golden.photo(), golden.noise(), golden.grey()])
    head = right_aesthetic._weight, right_aesthetic._bias
    with_head(right_aesthetic, folder, small.teach_predictor(right_aesthetic._clip.features(pictures), scores))
    assert message(right_aesthetic.self_test) == f"reward 'aesthetic' failed its self-test: {seen}: wrong weights?"
    right_aesthetic._weight, right_aesthetic._bias = head


def test_self_test_sees_a_wrong_scale(taught, monkeypatch):
    reward = taught("clipscore")
    monkeypatch.setattr(reward, "_factor", reward._factor / 7)
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
