"""`--help` shows every setting with its type, its default and what it means, in lines that fit the terminal."""

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from benchmarks.compare.settings import CompareSettings
from dgpo_fast.config.bounds import STRICT
from dgpo_fast.config.help import print_help, print_settings
from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import flat, parse_overrides
from dgpo_fast.evaluation.settings import EvaluationSettings
from dgpo_fast.rewards.serving.server import ServerSettings
from dgpo_fast.voting.settings import VoteSettings


@dataclass(kw_only=True, config=STRICT)
class Lamp:
    """How the lamp shines."""

    dim_at_night: bool = False
    """Half the light after ten."""
    colour: Literal["white", "warm white", "daylight", "the colour of a candle"] = "white"
    """White, or one of the others."""


@dataclass(kw_only=True, config=STRICT)
class Room:
    """A room."""

    width: Annotated[float, Field(gt=0)] | None = None
    """In metres,
    from wall to wall."""
    doors: tuple[str, ...] = ("north", "south")
    """Where they are."""
    people: tuple[str, ...] = ()
    """Who is in it."""
    chairs: Literal["auto"] | int = 3
    """auto: as many as there are people, and one more."""
    lamp: Lamp = Field(default_factory=Lamp)


HELP = """\
Furnish a room.

  python -m room --chairs 2
      with two chairs
  python -m room

Options beside the settings: none.

Settings:

  --width FLOAT | none [default: none]
      In metres, from wall to wall.
  --doors TEXT … [default: north south]
      Where they are.
  --people TEXT …
      Who is in it.
  --chairs auto | INT [default: 3]
      auto: as many as there are people, and one more.

lamp:
  How the lamp shines.

  --lamp.dim-at-night true | false [default: false]
      Half the light after ten.
  --lamp.colour white | warm white | daylight | the colour
        of a candle [default: white]
      White, or one of the others.
"""


def test_all_of_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "Furnish a room.\n\n  python -m room --chairs 2   with two chairs\n  python -m room\n\nOptions beside the\n"
    monkeypatch.setenv("COLUMNS", "58")
    print_settings(f"{usage}settings: none.", Room())
    assert capsys.readouterr().out == HELP
    monkeypatch.setenv("COLUMNS", "80")
    print_settings(f"{usage}settings: none.", Room())
    assert "\n  python -m room --chairs 2  with two chairs\n  python -m room\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [Config(), EvaluationSettings(), ServerSettings(), CompareSettings(), VoteSettings()]
)
def test_every_setting_is_shown_as_it_is_typed(
    settings: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a text, in lines of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    print_settings("Usage.", settings)
    lines = capsys.readouterr().out.splitlines()
    shown = [index for index, line in enumerate(lines) if line.startswith("  --")]
    options = [lines[index].split()[0] for index in shown]
    assert {option.removeprefix("--").replace("-", "_") for option in options} == set(flat(settings))
    assert all(parse_overrides([f"{option}=1"], settings) for option in options)
    for index in shown:
        text = next(line for line in lines[index + 1 :] if not line.startswith(" " * 8))
        assert re.match(r" {6}\S", text), lines[index]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("line", "prompts"),
    [("tiny-ocr --help", "tiny-signs"), ("--resume runs/a -h", "tiny-shapes"), ("-h", "tiny-shapes")],
)
def test_defaults_are_those_of_the_recipe(line: str, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the first one, if none is named."""
    print_help("Usage.", line.split())
    out = capsys.readouterr().out
    assert f"\n  --prompts TEXT [default: {prompts}]\n" in out
    assert re.search(r"\n  sd35m-ocr  +SD3\.5-Medium writing readable text\.\n", out)
