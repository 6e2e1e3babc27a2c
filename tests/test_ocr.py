"""The `ocr` reward: what is read on pictures, and what it scores."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import load_prompts
from dgpo_fast.rewards import load_rewards
from dgpo_fast.rewards.shipped.ocr import OcrReward, edit_distance, normalise, similarity
from tests.reward_cases import pictures
from tests.texts import message


@pytest.fixture(scope="module")
def ocr() -> OcrReward:
    return OcrReward()


def rendered(text: str, size: int = 40, shape: tuple[int, int] = (256, 512)) -> Image.Image:
    picture = Image.new("RGB", (shape[1], shape[0]), (190, 200, 210))
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = ImageDraw.Draw(picture).textbbox((0, 0), text, font=font)
    corner = ((shape[1] - right - left) / 2, (shape[0] - bottom - top) / 2)
    ImageDraw.Draw(picture).text(corner, text, fill=(30, 20, 60), font=font)
    return picture


def score(ocr: OcrReward, picture: Image.Image, target: str) -> float:
    rewards, parts = ocr(np.asarray(picture)[None], [f'a sign that says "{target}"'], [{}])
    assert rewards.dtype == np.float32 and parts["exact"].tolist() == [float(rewards[0] == 1)]
    return float(rewards[0])


@pytest.mark.parametrize("angle", [0, -5, 8])
@pytest.mark.parametrize(("text", "size"), [("Fresh Bread", 48), ("OPEN 24", 16), ("quiet please", 12)])
def test_clear_small_and_rotated_text_is_read(ocr, text, size, angle):
    picture = rendered(text, size).rotate(angle, Image.Resampling.BICUBIC, fillcolor=(190, 200, 210))
    assert score(ocr, picture, text) == 1


def test_noisy_text_is_read(ocr):
    noise = np.random.default_rng(0).normal(0, 25, (256, 512, 3))
    blurred = np.asarray(rendered("Golden Harbor").filter(ImageFilter.GaussianBlur(1)))
    assert score(ocr, Image.fromarray(np.clip(blurred + noise, 0, 255).astype(np.uint8)), "Golden Harbor") == 1


def test_misspelt_text_scores_by_its_letters(ocr):
    assert score(ocr, rendered("Golden Harbur"), "Golden Harbor") == pytest.approx(1 - 1 / 12)
    assert score(ocr, rendered("Golden"), "Golden Harbor") == pytest.approx(0.5)
    assert score(ocr, rendered("MIXTURE"), "zebra") < 0.3


def test_extra_words_cost_nothing_and_lines_are_joined(ocr):
    assert score(ocr, rendered("the golden harbor inn"), "Golden Harbor") == 1
    assert score(ocr, rendered("GOLDEN\nHARBOR"), "golden harbor") == 1


@pytest.mark.parametrize("size", [(1, 1), (31, 32), (64, 200), (512, 512), (700, 60), (30, 900)])
def test_blank_pictures_of_any_size_score_nothing(ocr, size):
    assert ocr.read(np.full((1, *size, 3), 200, np.uint8)) == [""]
    assert score(ocr, Image.new("RGB", size[::-1], "black"), "cat") == 0


def test_signs_of_the_small_pipeline_are_read(ocr):
    from dgpo_fast.tiny import data

    prompts = load_prompts("tiny-signs").held_out[:40]
    rng = np.random.default_rng(0)
    images = np.stack([data.render(p.metadata, rng) for p in prompts])
    scores, _ = ocr(images, [p.text for p in prompts], [p.metadata for p in prompts])
    assert scores.mean() > 0.95
    # One prompt's word on another's sign is worth what the letters in common are worth.
    swapped, _ = ocr(images[::-1], [p.text for p in prompts], [p.metadata for p in prompts])
    assert swapped.mean() < 0.35
    # A sign too blurred to be detected as text is still read, as one line.
    blurred = [np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(1))) for i in images]
    assert ocr(np.stack(blurred), [p.text for p in prompts], [{}] * 40)[0].mean() > 0.7


def test_a_picture_scores_alike_in_any_company(ocr):
    pictures = np.stack([np.asarray(rendered(text)) for text in ("one", "a much longer line", "three", "")])
    prompts = [f'"{text}"' for text in ("one", "a much longer line", "tree", "four")]
    together, _ = ocr(pictures, prompts, [{}] * 4)
    backwards, _ = OcrReward(workers=3)(pictures[::-1], prompts[::-1], [{}] * 4)
    alone = [ocr(pictures[i : i + 1], prompts[i : i + 1], [{}])[0][0] for i in range(4)]
    assert together.tolist() == alone == backwards[::-1].tolist()


def test_ocr_needs_quoted_text(ocr, tmp_path):
    (tmp_path / "p.txt").write_text('"cat"\na dog\n')
    reward = load_rewards(["ocr"])
    expected = f"{tmp_path / 'p.txt'}:2: no text between double quotes in 'a dog': "
    assert message(reward.check_prompts, load_prompts(str(tmp_path / "p.txt")).train).startswith(expected)
    with pytest.raises(UserError, match="no text between double quotes"):
        ocr(pictures(1, 32), ["a dog"], [{}])


def test_ocr_without_its_engine_says_what_to_install(monkeypatch):
    for package in ("rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
        expected = "reward 'ocr' needs RapidOCR: pip install 'rapidocr<4' onnxruntime"
        assert message(load_rewards, ["ocr"]) == expected
        monkeypatch.undo()


def test_ocr_is_quiet():
    code = (
        "import numpy as np; from dgpo_fast.rewards import load_rewards; "
        "load_rewards(['ocr']).rewards['ocr'].read(np.zeros((2, 64, 64, 3), np.uint8))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "" and ran.stderr == ""


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance_by_hand(a, b, expected):
    assert edit_distance(a, b) == expected


@given(st.text("ab c", max_size=8), st.text("ab c", max_size=8), st.text("ab c", max_size=8))
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@functools.cache
def edits(a: str, b: str) -> int:
    """The fewest letters to add, drop or change to get from one to the other, by the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("ab c", max_size=8), st.text("ab c", max_size=8))
def test_edit_distance_is_the_definitions(a, b):
    assert edit_distance(a, b) == edits(a, b)


@given(st.text("abAB ", min_size=1).filter(str.strip), st.text("abAB "))
def test_similarity_is_the_published_rule(target, text):
    t, u = target.replace(" ", "").lower(), text.replace(" ", "").lower()
    distance = 0 if t in u else edits(t, u)
    assert similarity(normalise(target), normalise(text)) == pytest.approx(1 - min(distance, len(t)) / len(t))


def test_the_documented_table_of_ocr_is_the_measured_one():
    root = Path(__file__).parents[1]
    measured = json.loads((root / "benchmarks" / "results" / "cpu" / "ocr_accuracy.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name, readers in measured["results"].items():
        cells = [f"{one['cpu_ms_per_image']:.0f} ms, {one['mean_score']:.2f}" for one in readers.values()]
        assert f"| {name} | {' | '.join(cells)} |" in page
