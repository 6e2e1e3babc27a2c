"""What `--help` prints: what a command does, and each of its settings with its type, its default and what it means.

Types and texts are those of the settings' dataclass: its annotations and the docstring below each setting.
"""

import re
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text

from dgpo_fast.config.command_line import configure
from dgpo_fast.config.recipes import RECIPES
from dgpo_fast.records import JsonObject

Schema = JsonObject
"""A JSON schema, as pydantic makes it."""
TYPES = {"string": "TEXT", "integer": "INT", "number": "FLOAT", "boolean": "true | false", "null": "none"}
MOST_COLUMNS = 120
FEWEST_COLUMNS = 40
"""For the text beside a name or a command."""


def print_help(usage: str, args: list[str]) -> None:
    """Prints what the command does, the recipes and every setting.

    Args:
        usage: as in `print_settings`.
        args: the command line; if it begins with a recipe or a file, the defaults are those.
    """
    recipes = "\n".join(f"  {name:<34} {_first_line(function)}" for name, function in RECIPES.items())
    defaults = configure([arg for arg in args[:1] if not arg.startswith("-")])
    print_settings(f"{usage}\n\nRecipes:\n\n{recipes}", defaults, "Settings (defaults: those of the chosen recipe):")


def print_settings(usage: str, defaults: Any, title: str = "Settings:") -> None:
    """Prints what the command does and every setting of the dataclass `defaults` with its value there.

    Args:
        usage: paragraphs, which are wrapped, and lists of lines that begin with two spaces.
        defaults: any dataclass of settings; those in groups follow after the others, group by group.
        title: stands above them.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = min(console.width, MOST_COLUMNS)
    for block in usage.split("\n\n"):
        console.print((_list if block.startswith("  ") else _paragraph)(block, console.width) + "\n", soft_wrap=True)
    console.print(f"{title}\n", style="bold")
    schema = TypeAdapter(type(defaults)).json_schema()
    _print_group(console, defaults, schema, schema.get("$defs", {}), prefix="")


def _print_group(console: Console, group: Any, schema: Schema, groups: dict[str, Schema], prefix: str) -> None:
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    for name, value in values.items():
        if not is_dataclass(value):
            setting, option = schema["properties"][name], f"--{prefix}{name}".replace("_", "-")
            line = f"{option} {_type(setting)}" + (f" [default: {_text(value)}]" if value != () else "")
            heading = Text(_paragraph(line, console.width, "  ", "        "))
            heading.highlight_words([option], "bold")
            console.print(heading, soft_wrap=True)
            console.print(_paragraph(setting["description"], console.width, "      "), soft_wrap=True)
    for name, value in values.items():
        if is_dataclass(value):
            inner = groups[type(value).__name__]
            console.print(f"\n{name}:", style="bold")
            console.print(_paragraph(inner["description"], console.width, "  ") + "\n", soft_wrap=True)
            _print_group(console, value, inner, groups, f"{prefix}{name}.")


def _type(schema: Schema) -> str:
    """`INT | none`, `auto | on | off`, `TEXT …`."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if "anyOf" in schema:
        choices = [_type(each) for each in schema["anyOf"]]
    if choices:
        return " | ".join(choices)
    return f"{_type(schema['items'])} …" if schema["type"] == "array" else TYPES[schema["type"]]


def _text(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _paragraph(text: str, width: int, indent: str = "", hanging: str | None = None) -> str:
    """`text` in lines of `width` characters: the first one after `indent`, the others after `hanging`."""
    wrapper = textwrap.TextWrapper(width, indent, indent if hanging is None else hanging)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(" ".join(text.split()))


def _list(block: str, width: int) -> str:
    """Names or commands and what they are, side by side; one below the other if that leaves too few columns."""
    rows = [re.split(r"(?<=\S)  +", line, maxsplit=1) for line in block.splitlines()]
    column = 2 + max((len(row[0]) for row in rows if len(row) == 2), default=0)
    if width - column < FEWEST_COLUMNS:
        return "\n".join("\n".join([row[0], *(_paragraph(text, width, "      ") for text in row[1:])]) for row in rows)
    indent = " " * column
    return "\n".join(_paragraph(row[1], width, row[0].ljust(column), indent) if row[1:] else row[0] for row in rows)


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]
