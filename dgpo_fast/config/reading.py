"""How settings are read: a recipe's, then those of a YAML file, then those of the command line.

All of them pass through `resolve`, so a misspelt key or a wrong type gives the same one-line error everywhere.
"""

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject

MAX_YAML_BYTES = 2**20
YAML = (".yaml", ".yml")
Settings = TypeVar("Settings")
"""A dataclass of settings: `Config`, or that of another command."""


def to_dict(settings: object) -> JsonObject:
    """Nested plain dictionary of a dataclass of settings, ready for YAML."""
    return TypeAdapter(type(settings)).dump_python(settings, mode="json")


def resolve(base: Settings, overrides: JsonObject, origin: str) -> Settings:
    """`base` with `overrides` applied, in groups or by dotted names (`rollout.groups`), and everything checked.

    Raises UserError in one line naming `origin` (a file, or "command line"), the key and the remedy.
    """
    settings = to_dict(base)
    _merge(settings, overrides, origin, known=to_dict(base), given=set())
    try:
        return TypeAdapter(type(base)).validate_python(settings)
    except ValidationError as error:
        problems = error.errors()
        key = _setting(problems[0]["loc"], settings)
        # A setting that may be of several types has a problem with each of them.
        messages = [problem["msg"] for problem in problems if _setting(problem["loc"], settings) == key]
        message = " or ".join([messages[0], *(more.removeprefix("Input should be ") for more in messages[1:])])
        message = message.removeprefix("Value error, ").replace("valid tuple", "list")
        got = f", not {problems[0]['input']!r}" if key else ""
        message = message[0].lower() + message[1:] if key else message
        raise UserError(f"{origin}: {key + ': ' if key else ''}{message}{got}") from None


def _setting(location: tuple[str | int, ...], settings: object) -> str:
    """The dotted name of what pydantic's `location` is in, without the types that it was tried as."""
    names = []
    for part in location:
        if isinstance(part, str) and not (isinstance(settings, dict) and part in settings):
            break
        names.append(str(part))
        settings = settings[part] if isinstance(settings, dict) else None
    return ".".join(names)


def _merge(
    settings: JsonObject, overrides: JsonObject, origin: str, *, known: JsonObject, given: set[str], prefix: str = ""
) -> None:
    """Puts `overrides` into `settings`; `given` has the names that were there already."""
    for key, value in overrides.items():
        group, dot, rest = str(key).partition(".")
        if dot and isinstance(settings.get(group), dict):
            key, value = group, {rest: value}
        name = f"{prefix}{key}"
        if key not in settings:
            raise UserError(f"{origin}: unknown setting '{name}'{_suggest(name, known)}")
        if not isinstance(settings[key], dict):
            if name in given:
                raise UserError(f"{origin}: '{name}' is given twice")
            given.add(name)
            settings[key] = value
        elif isinstance(value, dict):
            _merge(settings[key], value, origin, known=known, given=given, prefix=f"{name}.")
        else:
            raise UserError(
                f"{origin}: '{name}' is a group of settings; name one of them, as in "
                f"'{name}.{next(iter(settings[key]))}'"
            )


USUAL_NAMES = {
    "learning_rate": "optimizer.lr",
    "num_generations": "rollout.group_size",
    "max_steps": "iterations",
    "lora_r": "policy.lora_rank",
    "lora": "lora",
    "lora_path": "lora",
    "lora_weights": "lora",
}
"""Names of settings in other trainers, if they differ from those here."""
PURPOSES = {
    "height": "resolution takes HEIGHTxWIDTH, as in 512x768",
    "width": "resolution takes HEIGHTxWIDTH, as in 512x768",
}
"""What there is for a purpose whose usual setting is not here, though others have names like it."""


def _suggest(key: str, known: JsonObject) -> str:
    last = key.rsplit(".", 1)[-1]
    usual = USUAL_NAMES.get(last)
    if usual in flat_dict(known):
        return f": did you mean '{usual}'?"
    if last in PURPOSES:
        return f": {PURPOSES[last]}"
    names = [*flat_dict(known), *(name for name, value in known.items() if isinstance(value, dict))]
    last_parts = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    close = close or [last_parts[n] for n in difflib.get_close_matches(last, list(last_parts), n=1, cutoff=0.7)]
    return f": did you mean '{close[0]}'?" if close else "; --help lists them"


def flat(settings: object) -> JsonObject:
    """Every setting of a dataclass of settings by its dotted name."""
    return flat_dict(to_dict(settings))


def flat_dict(settings: JsonObject, prefix: str = "") -> JsonObject:
    """As `flat`, of the nested dictionary that `to_dict` gives."""
    found: JsonObject = {}
    for key, value in settings.items():
        found |= flat_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def parse_overrides(args: list[str], settings: object | None = None) -> JsonObject:
    """`["--rollout.groups", "16", "--rewards", "a", "b"]` as a nested dictionary; values stay text for `resolve`.

    A yes-or-no setting may stand alone: `--random-weights` is `--random-weights true`. A list given twice adds up.

    Args:
        args: the command line.
        settings: what is overridden, a `Config` if not given.
    """
    defaults = flat(settings or Config())
    lists = {name for name, value in defaults.items() if isinstance(value, (tuple, list))}
    flags = {name for name, value in defaults.items() if isinstance(value, bool)}
    overrides: JsonObject = {}
    index = 0
    while index < len(args):
        name, equals, inline = args[index].removeprefix("--").partition("=")
        if not args[index].startswith("--") or not name:
            raise UserError(f"command line: unexpected '{args[index]}': settings are given as --name value")
        index += 1
        values = [inline] if equals else []
        while index < len(args) and not args[index].startswith("--"):
            values.append(args[index])
            index += 1
        key = name.replace("-", "_")
        *groups, leaf = key.split(".")
        target = overrides
        for group in groups:
            target = target.setdefault(group, {})
        if key in lists:
            values = [*target.get(leaf, []), *values]
        value = True if key in flags and not values else _value(name, values, key in lists)
        # Only where "none" is no word of the setting's own does it stand for no value.
        none = isinstance(value, str) and value.lower() in ("none", "null") and defaults.get(key) != "none"
        target[leaf] = None if none else value
    return overrides


def _value(name: str, values: list[str], is_list: bool) -> str | list[str]:
    if is_list and values:
        return values
    if len(values) != 1:
        problem = "has no value" if not values else f"takes one value, not {len(values)}"
        raise UserError(f"command line: --{name} {problem}")
    return values[0]


class _PlainLoader(yaml.SafeLoader):
    """Reads plain values alone: no tags that make objects, and no aliases, which a few lines blow up to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """A mapping; the second of two equal keys would silently win otherwise."""
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


_BOOL, _INT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "timestamp"))
# As YAML 1.2 has it: `off` and `no` are words that settings use, and a date is a name of a run. Whole numbers are
# decimal: `0x512` is a mistyped picture size, and `8:30` no count of minutes.
_PlainLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT, _TIMESTAMP)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_PlainLoader.add_implicit_resolver(_INT, re.compile("^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def read_yaml(path: Path) -> JsonObject:
    """Settings from a user's YAML file. Raises UserError naming the file, and the line if it is known."""
    path = path.expanduser()
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"{path}: larger than {MAX_YAML_BYTES} bytes: is this a file of settings?")
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_near_file(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply: settings are `key: value` lines") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings must be `key: value` lines, not a {type(settings).__name__}")
    return settings


def _near_file(path: Path) -> str:
    """`: did you mean my_recipe.yaml?`, if a settings file beside `path`, which is none, has a name like it."""
    beside = {found.name: found for ending in YAML for found in path.parent.glob(f"*{ending}") if found.is_file()}
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f": did you mean {beside[close[0]]}?" if close else f": check the path (the working folder is {Path.cwd()})"


def write_yaml(config: Config, path: Path) -> None:
    """Writes the resolved configuration, one group after another; the file is the old one or the new one."""
    staged = path.with_name(f".{path.name}")
    staged.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    staged.replace(path)
