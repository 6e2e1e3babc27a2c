"""GenEval: what is read off a detector and a CLIP, and what becomes of it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import load_prompts
from dgpo_fast.prompts.geneval import CLASSES, COLORS, TAGS
from dgpo_fast.rewards.shipped import geneval
from dgpo_fast.rewards.shipped.geneval import ColorJudge, Detector, GenevalReward, box_of, crop, read_out
from dgpo_fast.rewards.shipped.geneval_rules import THRESHOLD, Detection
from tests.model_rewards.cases import at, message, noise

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
            50 * outputs.class_queries_logits,
            10 * outputs.masks_queries_logits,
        )
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
        (
            '{"prompt": "a", "include": [{"class": "unicorn", "count": 1}]}',
            "reward 'geneval-hf' has no class 'unicorn': use one of COCO's 80 classes in GenEval's spelling",
        ),
        (
            '{"prompt": "a", "include": [{"class": "mouse", "count": 1}]}',
            "reward 'geneval-hf' has no class 'mouse': use one of COCO's 80 classes in GenEval's spelling",
        ),
        (
            '{"prompt": "a", "include": [{"class": "cat", "count": 1, "color": "teal"}]}',
            "reward 'geneval-hf' has no color 'teal': use one of red, orange, yellow, green, blue, purple, pink, "
            "brown, black, white",
        ),
        (
            '{"prompt": "a", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": '
            '["inside", 0]}]}',
            "reward 'geneval-hf' has no position 'inside': use one of left of, right of, above, below",
        ),
        (
            '{"prompt": "a", "include": [{"class": "cat", "count": 1}], "exclude": [{"class": "orc", "count": 1}]}',
            "reward 'geneval-hf' has no class 'orc': use one of COCO's 80 classes in GenEval's spelling",
        ),
    ],
)
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
        ("Counting", "counting"),
        ("COUNTING", "counting"),
        (" counting", "counting"),
        ("countings", "counting"),
        ("single-object", "single_object"),
        ("Two objects", "two_object"),
        ("twoObject", "two_object"),
        ("color", "colors"),
        ("Colours", "colors"),
        ("positions", "position"),
        ("color-attr", "color_attr"),
        ("colors_attrs", "color_attr"),
    ],
)
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
