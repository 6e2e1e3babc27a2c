"""Phrases that several commands' messages share."""

import math
import shlex
from pathlib import Path

FEWEST_PROMPTS = 5
"""Over fewer prompts an interval is as wide as what scores can be: files have it, no table shows it."""
NO_HUB_NAME = ", and no name on the hub (organisation/name)"


FAULTS = (
    "",
    "the transformer gave NaN",
    "the transformer gave infinity",
    "the decoder gave NaN",
    "the decoder gave infinity",
)
"""What can be wrong with a picture, by its number in `Pictures.faults`; the first is nothing."""


def counted(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def size_in_words(height: int, width: int) -> str:
    """`512 × 512 pixels`, `512 high, 768 wide`."""
    return f"{height} × {width} pixels" if height == width else f"{height} high, {width} wide"


def one_line(text: object) -> str:
    """`text`, for example an error, on one line."""
    return " ".join(str(text).split())


def number(value: float, places: int = 3, sign: str = "") -> str:
    """A reward as tables show it, `0.564`; from 100,000 on, six digits: `123457`, `1.23457e+09`. NaN is `–`.

    Args:
        value: any.
        places: after the point.
        sign: "+" gives one to positive values too.
    """
    if math.isnan(value):
        return "–"
    return f"{value:{sign}.{places}f}" if abs(value) < 1e5 else f"{value:{sign}.6g}"


def resume_command(folder: Path) -> str:
    """The command that resumes the run in `folder`."""
    return f"python -m dgpo_fast.train --resume {shlex.quote(str(folder))}"
