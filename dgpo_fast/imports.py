"""A user's own code, named `my_module:MyClass`: imported and called with errors of one line."""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dgpo_fast.errors import UserError


def import_attribute(what: str, path: str, example: str) -> Any:
    """The attribute that `path`, written `module:attribute`, names.

    Args:
        what: what it is for, as errors name it: "reward 'my_rewards:Brightness'".
        path: the module is looked for in the working folder and among installed packages.
        example: a path as it should be, for the error.

    Raises:
        UserError: one line.
    """
    module_name, _, attribute = path.partition(":")
    is_module = all(part.isidentifier() for part in module_name.split(".")) and not module_name.endswith(".py")
    if not is_module or not attribute:
        raise UserError(f"{what}: write module:attribute as in an import, for example {example}")
    module = call(what, "cannot be imported", _find_module, module_name)
    if module is None:
        raise UserError(f"{what}: no module {module_name!r} in the working folder or among installed packages")
    if not hasattr(module, attribute):
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{what}: module {module_name!r} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def call(what: str, failed: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls code that may be a user's, and says in one line what `failed` and where."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} {failed}: {message} ({place.filename}, line {place.lineno})") from error


def _find_module(module_name: str) -> ModuleType | None:
    """Imports a module; None where there is none, as opposed to one that lacks something it imports itself."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            return None
        raise
