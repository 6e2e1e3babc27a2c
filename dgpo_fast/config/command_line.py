"""What all commands share: errors in one line, and settings from a recipe, a YAML file and the command line."""

import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import YAML, parse_overrides, read_yaml, resolve
from dgpo_fast.config.recipes import RECIPES, get_recipe
from dgpo_fast.errors import UserError

BAD_INPUT = 2
INTERRUPTED = 130
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EFBIG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ESTALE,  # an NFS server that was started again
    errno.ENOTCONN,  # a FUSE mount whose server has ended
}


def run_command(command: Callable[[list[str]], int | None]) -> int:
    """Runs `command` with the command line's arguments and returns the exit status, errors printed in one line."""
    quieten_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal without some letter
    try:
        status = command(sys.argv[1:]) or 0
        print(end="", flush=True)  # here, where a reader that has left is no error
        return status
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or not error.shared:
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: say nothing more, at exit too
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def launched_with_others() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def leave(status: int) -> NoReturn:
    """Ends this process after all output is written."""
    if launched_with_others():
        # The communication's threads and the interpreter's end race, and may end in an abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def quieten_libraries() -> None:
    """Silences the libraries' messages while they are imported; they are about packages that are not needed here."""
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # diffusers imports it wherever it is installed, and it warns of a 4-bit kernel from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Says of a font that is only installed in another weight that it takes that one.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def take_option(args: list[str], name: str) -> str | None:
    """Removes `--name VALUE` or `--name=VALUE` from `args` and returns the value; None if it is not given."""
    for index, arg in enumerate(args):
        if arg.startswith(f"--{name}="):
            return args.pop(index).split("=", 1)[1]
        if arg == f"--{name}":
            if index + 1 == len(args) or args[index + 1].startswith("--"):
                raise UserError(f"command line: --{name} has no value")
            args.pop(index)
            return args.pop(index)
    return None


def take_count(args: list[str], name: str, default: int) -> int:
    """`take_option` of a whole number from 1 up; `default` if it is not given."""
    given = take_option(args, name)
    if given is None:
        return default
    if not given.isdigit() or int(given) == 0:
        raise UserError(f"command line: --{name}: a whole number from 1 up, not '{given}'")
    return int(given)


def configure(args: list[str]) -> Config:
    """The configuration of `[RECIPE or FILE.yaml] [--config FILE.yaml] [--setting value …]`.

    A YAML file may name the recipe that it starts from under `recipe`.
    """
    args = list(args)
    start = args.pop(0) if args and not args[0].startswith("-") else None
    file = take_option(args, "config")
    if start is not None and start.endswith(YAML):
        if file is not None:
            raise UserError(f"command line: two configurations, {start} and {file}: give one")
        start, file = None, start
    if start is not None and start not in RECIPES:
        file_of_that_name = next((start + ending for ending in YAML if Path(start + ending).is_file()), None)
        if file_of_that_name is not None:
            raise UserError(f"unknown recipe '{start}': did you mean {file_of_that_name}?")
    settings = read_yaml(Path(file)) if file else {}
    overrides = parse_overrides(args)
    if start is not None and "recipe" in overrides:
        raise UserError(f"command line: two recipes, {start} and {overrides['recipe']}: give one")
    given = start or overrides.get("recipe")
    name = given or settings.get("recipe") or next(iter(RECIPES))
    config = resolve(get_recipe(str(name), None if given else file), {**settings, "recipe": name}, file or "recipe")
    return resolve(config, overrides, "command line")
