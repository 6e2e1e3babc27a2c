"""Captions in any script: fonts that have their letters, and lines of equal width."""

import unicodedata
from collections.abc import Iterable
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from rich.console import Console
from rich.text import Text

USUAL = "DejaVu Sans"
"""Comes with matplotlib."""
NO_LETTERS = "Last Resort"
"""Fonts of this name have a box for every letter."""
BOX = "□"
"""Is drawn for letters that no font has."""
TOLD_LETTERS = 8
_CONSOLE = Console(width=80)


def fonts(text: str) -> list[str]:
    """Font families that together have the letters of `text`, as far as they are installed; the usual one first."""
    chosen, left = [USUAL], _lacking(text, [USUAL])
    while left:
        best = max(_installed(), key=lambda name: len(left & _letters(name)), default=USUAL)
        if not left & _letters(best):
            break
        chosen.append(best)
        left -= _letters(best)
    return chosen


def drawable(text: str) -> str:
    """`text` without invisible marks, and with a box for each letter that no installed font has."""
    shown = _visible(text)
    lacking = _lacking(shown, fonts(shown))
    return "".join(BOX if ord(letter) in lacking else letter for letter in shown)


def missing_note(texts: Iterable[str]) -> str:
    """A line on the letters of captions that are drawn as boxes; empty if there are none."""
    letters = [
        letter
        for text in texts
        for letter, shown in zip(_visible(text), drawable(text), strict=True)
        if shown == BOX != letter
    ]
    if not letters:
        return ""
    distinct = list(dict.fromkeys(letters))
    more = " …" if len(distinct) > TOLD_LETTERS else ""
    return (
        f"pictures: no font on this machine has {' '.join(distinct[:TOLD_LETTERS])}{more}: captions show {BOX} "
        "instead; install one that has them, for example Noto Sans CJK"
    )


def wrapped(text: str, width: int, lines: int) -> str:
    """The first `lines` lines of `text` at `width` letters, of which wide ones, as in Chinese, count twice."""
    broken = [part.plain.rstrip() for line in text.split("\n") for part in Text(line).wrap(_CONSOLE, width)]
    return "\n".join(broken[:lines])


def _visible(text: str) -> str:
    """`text` without control characters but line ends, and without marks that only change their neighbours."""
    return "".join(mark for mark in text.replace("\t", " ") if mark == "\n" or not _is_invisible(mark))


def _is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf") or "\ufe00" <= letter <= "\ufe0f"


def _lacking(text: str, names: Iterable[str]) -> frozenset[int]:
    """Code points of `text` that none of the fonts has."""
    return frozenset(map(ord, text)) - {ord("\n")} - frozenset().union(*map(_letters, names))


@cache
def _installed() -> tuple[str, ...]:
    """The families of all fonts on this machine, also of those installed since matplotlib has last looked."""
    known = {font.fname for font in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        try:
            fontManager.addfont(path)
        except (OSError, RuntimeError):
            continue  # a damaged file, or a kind that matplotlib does not read
    return tuple(sorted({font.name for font in fontManager.ttflist if not font.name.startswith(NO_LETTERS)}))


@cache
def _letters(name: str) -> frozenset[int]:
    """Code points that the font of this family has in its usual style; none if matplotlib cannot draw with it."""
    try:
        font = get_font(findfont(FontProperties(family=name)))
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
