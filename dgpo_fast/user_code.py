"""A user's own code, named `my_module:MyClass`: imported and called with errors of one line."""

from __future__ import annotations

import difflib
import importlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dgpo_fast.errors import UserError
from dgpo_fast.wording import one_line

NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, os.__file__))
Result = TypeVar("Result")
PACKAGES = {"site-packages", "dist-packages"}


def import_attribute(what: str, path: str, example: str) -> Any:
    """The attribute that `path`, written `module:attribute`, names.

    Args:
        what: what it is for, as errors name it: "reward 'my_reward:Brightness'".
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


def call(what: str, failed: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Calls code that may be a user's, and says in one line what `failed` and where."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} {failed}: {told(error)}") from error


def told(error: BaseException, limit: int | None = None) -> str:
    """An error of code that may be a user's, in one line: `KeyError: 'tag' (my_reward.py, line 18)`.

    The place is the last one in the user's own code; there is none if the error comes from elsewhere.

    Args:
        error: what was raised.
        limit: most characters before the place.
    """
    message = one_line(f"{type(error).__name__}: {error}")[:limit]
    frames = [] if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)  # it says where itself
    own = [frame for frame in frames if _is_the_users(frame.filename)]
    if not own:
        return message
    file, here = Path(own[-1].filename), Path.cwd()
    return f"{message} ({file.relative_to(here) if file.is_relative_to(here) else file}, line {own[-1].lineno})"


def _is_the_users(file: str) -> bool:
    """Whether code in `file` is neither this package's nor Python's nor an installed package's."""
    return not (file.startswith(("<", *NOT_THE_USERS)) or PACKAGES & set(Path(file).parts))


def _find_module(module_name: str) -> ModuleType | None:
    """Imports a module; None if there is none, as opposed to one that lacks something it imports itself."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            return None
        raise
