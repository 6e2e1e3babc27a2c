"""Types of settings with their bounds."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Guidance = Annotated[float, Field(ge=1, allow_inf_nan=False)]
ModelGuidance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Of a model, whose own number may begin at 0."""
Shift = Annotated[float, Field(gt=0, le=100)]
SMALLEST_SIDE = 16
"""Of pictures, in pixels."""


def _as_resolution(given: object) -> int | str:
    """`given` with equal sides as one number. Raises ValueError for anything but `SIDE` and `HEIGHTxWIDTH`."""
    sides = re.fullmatch("([0-9]{1,9})(?:x([0-9]{1,9}))?", str(given).strip().lower().replace("×", "x"))
    if sides is None:
        raise ValueError("write HEIGHTxWIDTH in pixels, such as 512x768, or one number for a square")
    height, width = int(sides[1]), int(sides[2] or sides[1])
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"each side must be {SMALLEST_SIDE} pixels or more")
    return height if height == width else f"{height}x{width}"


Resolution = Annotated[
    int | str, BeforeValidator(_as_resolution), WithJsonSchema({"enum": ["SIDE", "HEIGHTxWIDTH"], "type": "string"})
]
"""Of pictures, in pixels: the side of a square, or `HEIGHTxWIDTH`. `size_of` gives both sides."""


def size_of(resolution: int | str) -> tuple[int, int]:
    """(height, width) of a `Resolution`."""
    height, _, width = str(resolution).partition("x")
    return int(height), int(width or height)


CARD_GB = range(1, 1025)


def _as_card(given: object) -> str | None:
    """`24GB` for `24GB`, `24 gb` and 24. Raises ValueError for anything but that, "auto" and None."""
    text = str(given).strip().lower()
    memory = re.fullmatch("([0-9]{1,4}) ?(?:gi?b)?", text)
    if given is None or text == "auto":
        return None if given is None else text
    if memory is None or int(memory[1]) not in CARD_GB:
        raise ValueError("write the memory of the card, as 24GB, or auto for the GPU that is here")
    return f"{int(memory[1])}GB"


Card = Annotated[str | None, BeforeValidator(_as_card)]
"""The memory of a GPU as `24GB`; "auto": what is free on the one that is here."""


def card_bytes(card: str) -> int:
    """Of a card `24GB`: makers' GB of a GPU's memory are 2³⁰ bytes."""
    return int(card.removesuffix("GB")) * 2**30


PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or a name in its place; `~` is the user's home."""
Names = Annotated[tuple[str, ...], BeforeValidator(lambda given: [given] if isinstance(given, str) else given or [])]
"""Several names, or one."""
Text = Annotated[str, BeforeValidator(lambda given: "" if given is None else given), AfterValidator(str.strip)]
"""A text; none is the empty one."""
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # the docstrings are what `--help` prints
