"""Captions of pictures, in whatever script a prompt is."""

import sys
import warnings
from pathlib import Path

import matplotlib.font_manager
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from dgpo_fast.config.command_line import run_command
from dgpo_fast.evaluation import captions
from dgpo_fast.evaluation.captions import BOX, drawable, fonts, missing_note, wrapped
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.figures import contact_sheet
from tests.evaluation.cases import SMALL

CJK = ["你好世界", "東京ラーメン", "안녕"]
PICTURE = np.full((32, 32, 3), 255, np.uint8)


def make_font(path: Path, family: str, letters: str, weight: int = 400) -> Path:
    """A font in which each of `letters` is a black square."""
    pen = TTGlyphPen(None)
    for number, point in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        pen.lineTo(point) if number else pen.moveTo(point)
    pen.closePath()
    square, names = pen.glyph(), [f"letter{number}" for number in range(len(letters))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, letters), names, strict=True)))
    builder.setupGlyf(dict.fromkeys((".notdef", *names), square))
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names), (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=weight)
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Says which fonts are installed beside matplotlib's own; a fresh look at them."""
    manager = matplotlib.font_manager.fontManager

    def install(*paths: Path) -> None:
        own = Path(matplotlib.get_data_path())
        monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if own in Path(font.fname).parents])
        monkeypatch.setattr(captions, "findSystemFonts", lambda: [str(path) for path in paths])
        for remembered in (captions._installed, captions._letters, manager._findfont_cached):
            remembered.cache_clear()

    yield install
    monkeypatch.undo()
    for remembered in (captions._installed, captions._letters, manager._findfont_cached):
        remembered.cache_clear()


def ink(path: Path) -> int:
    """Dark pixels below the first picture of a contact sheet."""
    picture = np.asarray(Image.open(path).convert("L"))
    return int((picture[int(0.75 * len(picture)) :] < 128).sum())


def test_a_font_that_has_the_letters_is_found(tmp_path: Path, machine) -> None:
    """Of several, also of one that was installed after matplotlib had looked; damaged files are passed over."""
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    machine(
        tmp_path / "damaged.ttf",
        make_font(tmp_path / "few.ttf", "Few Letters", "你안"),
        make_font(tmp_path / "han.ttf", "Stand In Han", "".join(CJK[:2])),
        make_font(tmp_path / "hangul.ttf", "Stand In Hangul", CJK[2]),
    )
    assert fonts("a sign: É") == ["DejaVu Sans"]
    assert fonts(CJK[0]) == ["DejaVu Sans", "Stand In Han"]
    assert fonts(f"{CJK[1]} {CJK[2]}") == ["DejaVu Sans", "Stand In Han", "Stand In Hangul"]
    assert all(drawable(text) == text for text in CJK) and missing_note(CJK) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contact_sheet([PICTURE], [CJK[0]], tmp_path / "sheet.png")
    assert ink(tmp_path / "sheet.png") > 200, "four black squares"


def test_without_such_a_font_there_is_one_note(tmp_path: Path, machine) -> None:
    machine()
    assert fonts(CJK[0]) == ["DejaVu Sans"]
    assert drawable("a 你 b") == f"a {BOX} b"
    assert missing_note(["a cat", "你好 □", *CJK]) == (
        "pictures: no font on this machine has 你 好 世 界 東 京 ラ ー …: captions show □ instead; install one that "
        "has them, for example Noto Sans CJK"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contact_sheet([PICTURE] * 3, CJK, tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u200bb \ufeffc", "ab c"),
        ("a\tb\x07c", "a bc"),
        ("i\u2764\ufe0fu", "i\u2764u"),
        ("cafe\u0301", "cafe\u0301"),
        ("\U0001f468\u200d\U0001f373 cook", f"{BOX}{BOX} cook"),
        ("\U00020bb7野家", f"{BOX}{BOX}{BOX}"),
        ("नमस्ते", BOX * 6),
    ],
    ids=ascii,
)
def test_marks_without_a_shape_and_rare_letters(text: str, shown: str, tmp_path: Path, machine) -> None:
    machine()
    assert drawable(text) == shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contact_sheet([PICTURE], [text], tmp_path / "sheet.png")


def test_wide_letters_count_twice() -> None:
    assert wrapped("a cat on a mat", 8, 3) == "a cat on\na mat"
    assert wrapped("東京ラーメンの看板", 8, 2) == "東京ラー\nメンの看"
    assert wrapped("one\ntwo three", 20, 9) == "one\ntwo three"


def test_an_evaluation_of_such_prompts_says_it_once(
    workspace: Path,
    machine,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no library says anything, not even of a font that is there in bold alone."""
    machine(make_font(workspace / "bold.ttf", "Bold Alone", "你好", weight=700))
    (workspace / "prompts.txt").write_text("".join(f'a sign that says "{words}"\n' for words in CJK), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")
        monkeypatch.setattr(sys, "argv", ["evaluate", "model", *SMALL, "--output", "out"])
        assert run_command(evaluate) == 0
    captured = capsys.readouterr()
    assert captured.out.replace("\n", " ").count("pictures: no font on this machine has") == 1
    assert "has 世 界 東 " in captured.out.replace("\n", " ")
    assert "findfont" not in captured.err + caplog.text
