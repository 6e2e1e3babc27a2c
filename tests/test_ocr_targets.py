"""What the `ocr` reward asks for: a picture that shows exactly these words gets the full score, whatever letters they
have; a prompt whose words the engine cannot read is refused."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards.shipped.ocr import OcrReward, normalise

SAME = [
    "it's it’s it‘s it`s itʼs",
    "9-5 9–5 9—5 9‐5 9−5",
    "wait... wait…",
    "café cafe\u0301 CAFÉ",
    "5% 5％",
    "straße STRASSE",
]
SAME += ["OPEN O\u200bPEN OPE\u00adN\u2060 ＯＰＥＮ", "2m² 2m2", "Ⅳ IV", "ﬁne fine", "K \u212a"]
SAME += ["istanbul İstanbul", '"best" “best” „best‟', "No5 №5"]


@pytest.fixture(scope="module")
def ocr() -> OcrReward:
    return OcrReward(workers=1)


def drawn(text: str) -> np.ndarray:
    """`text` in black on white, in a font that has its letters, uint8 (H, W, 3)."""
    font = ImageFont.truetype(findfont("DejaVu Sans"), 40)
    picture = Image.new("RGB", (int(font.getlength(text)) + 60, 110), "white")
    ImageDraw.Draw(picture).text((30, 30), text, "black", font=font)
    return np.asarray(picture)


@pytest.mark.parametrize("spellings", SAME)
def test_what_looks_alike_is_alike(spellings: str) -> None:
    assert len({normalise(one) for one in spellings.split(" ")}) == 1


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("i\u0307´¨’İ½ﬁ")))
def test_normal_forms_stay_as_they_are(text: str) -> None:
    """However a reading spells what a target says: composed or not, and normalised once more."""
    assert normalise(normalise(text)) == normalise(text)
    assert normalise(unicodedata.normalize("NFD", text)) == normalise(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize(
    "words",
    [
        "Honk If You’re Holographic",
        "CAFE\u0301",
        "Wait … here",
        "№ 5",
        "Straße",
        "9–5 — daily",
        "½ price",
        "İstanbul",
        "naïve ÀÉÎ",
    ],
)
def test_words_as_the_prompt_has_them_get_the_full_score(words: str, ocr: OcrReward) -> None:
    prompt = f'a sign that says "{words}"'
    ocr.check_prompts([Prompt(prompt)])
    rewards, parts = ocr(drawn(unicodedata.normalize("NFC", words))[None], [prompt], [{}])
    assert rewards[0] == parts["exact"][0] == 1


def test_quotes_that_are_not_the_words(ocr: OcrReward) -> None:
    """Inches and feet are no quotes: the words are those after `says`."""
    for prompt, words in (('a 12" ruler beside a sign that says "OPEN"', "OPEN"), ("a 5'10\" man, reading “HI”", "HI")):
        assert ocr(drawn(words)[None], [prompt], [{}])[0] == 1


@pytest.mark.parametrize(
    ("words", "unread"),
    [
        ("ПРИВЕТ", "привет"),
        ("안녕", "안녕"),
        ("ok Привет", "привет"),
        ("שלום", "שלום"),
        ("Ελλάδα", "ά"),
        ("hi 🙂", "🙂"),
    ],
)
def test_letters_that_cannot_be_read_are_refused(words: str, unread: str, ocr: OcrReward) -> None:
    with pytest.raises(UserError) as caught:
        ocr.check_prompts([Prompt('a sign that says "OPEN"'), Prompt(f'a sign: "{words}"', origin="p.txt:2")])
    assert str(caught.value) == (
        f"p.txt:2: reward 'ocr' cannot read {unread!r} in {words!r}: leave these letters out, or remove the line"
    )
