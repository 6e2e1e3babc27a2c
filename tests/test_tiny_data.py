"""The miniature world: prompts, splits and pictures."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.errors import UserError
from dgpo_fast.tiny import data
from dgpo_fast.tiny.shapes import ShapesReward

PROMPTS = data.all_prompts()
REWARD = ShapesReward()
HELDOUT_SINGLES = [
    "a photo of a star",
    "a photo of a ring",
    "a photo of three circles",
    "a photo of two squares",
    "a photo of three crosses",
    "a photo of four rings",
]


def test_prompts_are_distinct_and_carry_geneval_metadata():
    texts = [text for text, _ in PROMPTS]
    assert len(set(texts)) == len(texts) == 6 + 30 + 18 + 36 + 120 + 900
    by_text = dict(PROMPTS)
    assert by_text["a photo of three crosses"] == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert by_text["a photo of a circle left of a square"]["include"] == [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]
    assert by_text["a photo of an orange ring and a blue star"]["include"] == [
        {"class": "ring", "count": 1, "color": "orange"},
        {"class": "star", "count": 1, "color": "blue"},
    ]


def test_split_is_stable_disjoint_and_a_quarter_of_every_tag():
    train, heldout = data.shape_prompts("train"), data.shape_prompts("heldout")
    assert sorted(text for text, _ in train + heldout) == sorted(text for text, _ in PROMPTS)
    counts = Counter(m["tag"] for _, m in heldout)
    assert counts == {
        "single_object": 2,
        "two_object": 8,
        "counting": 4,
        "colors": 9,
        "position": 30,
        "color_attr": 224,
    }
    singles = [text for text, m in heldout if m["tag"] in ("single_object", "counting")]
    # Written down: a split that moves between versions would evaluate a model on what it was trained on.
    assert singles == HELDOUT_SINGLES


def test_split_keeps_a_scene_on_one_side():
    train = {text for text, _ in data.shape_prompts("train")}
    for a, b in (("circle", "star"), ("ring", "cross"), ("square", "triangle")):
        for relation, mirror in (("left of", "right of"), ("above", "below")):
            same = {f"a photo of a {a} {relation} a {b}", f"a photo of a {b} {mirror} a {a}"}
            assert len(same & train) in (0, 2)
        assert len({f"a photo of a {a} and a {b}", f"a photo of a {b} and a {a}"} & train) in (0, 2)


def test_signs():
    train, heldout = data.sign_prompts("train"), data.sign_prompts("heldout")
    words = {m["text"] for _, m in train}
    assert len(words) > 2000 and len(heldout) >= 128 and not words & {m["text"] for _, m in heldout}
    assert "RED" not in words | {m["text"] for _, m in heldout}
    text, metadata = train[0]
    assert metadata == {"tag": "ocr", "text": "BAB", "prompt": text} and text == 'a sign that says "BAB"'


def test_weights_give_tags_their_share():
    prompts = data.shape_prompts("train")
    p = data.weights(prompts, dict.fromkeys(data.TAGS, 1) | {"position": 2})
    tags = np.array([m["tag"] for _, m in prompts])
    assert p.sum() == pytest.approx(1)
    assert p[tags == "position"].sum() == pytest.approx(2 / 7)
    assert len(set(p[tags == "counting"])) == 1
    with pytest.raises(UserError, match="change the mix"):
        data.weights(prompts, {"ocr": 1})


def test_balanced_takes_tags_in_turn():
    chosen = data.balanced(data.shape_prompts("heldout"), 60)
    assert set(Counter(m["tag"] for _, m in chosen).values()) == {10}
    assert chosen[:12] == data.balanced(data.shape_prompts("heldout"), 12)
    assert len({text for text, m in chosen if m["tag"] == "position"}) == 10


@settings(max_examples=100, deadline=None)
@given(index=st.integers(0, len(PROMPTS) - 1), seed=st.integers(0, 2**32 - 1))
def test_every_picture_satisfies_its_prompt(index: int, seed: int):
    text, metadata = PROMPTS[index]
    picture = data.render(metadata, np.random.default_rng(seed))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, data.render(metadata, np.random.default_rng(seed)))
    graded, parts = REWARD(picture[None], [text], [metadata])
    assert graded[0] == 1 and parts["correct"][0] == 1 and parts["strict"][0] == 1


def test_signs_are_readable():
    pytest.importorskip("rapidocr")
    from dgpo_fast.rewards.shipped.ocr import OcrReward

    rng = np.random.default_rng(0)
    prompts = [data.sign_prompts("heldout")[i] for i in rng.choice(682, 48, replace=False)]
    pictures = np.stack([data.render(m, rng) for _, m in prompts])
    scores, _ = OcrReward(workers=1)(pictures, [text for text, _ in prompts], [m for _, m in prompts])
    assert scores.mean() >= 0.9


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "ocr", "text": "cat"}, "three letters A-Z, not 'cat'"),
        ({"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}]}, "no red bench"),
        ({"tag": "counting", "include": [{"class": "star", "count": 5}]}, "1 to 4 objects, not 5"),
        (
            {"include": [{"class": "star", "count": 1}, {"class": "ring", "count": 1, "position": ["near", 0]}]},
            "no relation 'near'",
        ),
    ],
)
def test_what_the_world_lacks_is_a_user_error(metadata: dict, message: str):
    with pytest.raises(UserError, match=message):
        data.render(metadata, np.random.default_rng(0))


def test_unknown_split():
    with pytest.raises(UserError, match="no split 'test'"):
        data.shape_prompts("test")  # type: ignore[arg-type]
