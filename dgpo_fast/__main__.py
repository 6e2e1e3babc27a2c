"""`dgpo-fast` and `python -m dgpo_fast`: what commands there are, and the way into each of them.

A command runs as `python -m dgpo_fast.NAME` does. Nothing heavy is imported before it is known which one.
"""

import difflib
import os
import runpy
import sys

from dgpo_fast.config.command_line import run_command
from dgpo_fast.errors import UserError

COMMANDS = {
    "train": "reinforce a model; without arguments, the shipped one",
    "evaluate": "score images of a model or a run, or compare two",
    "vote": "judge a model's pictures in the browser, to train on",
    "merge": "merge a LoRA into a model, as a folder for diffusers",
    "export": "write a run's weights and model card, or upload them",
    "profile": "show where the time of an iteration goes, on one page",
    "memory": "predict the GPU memory of a run and the cards it fits",
    "recipes": "print all recipes as a table",
    "reward-server": "score images for runs on other machines",
}
MOVED = ("compare",)
"""Commands that only say where they are now."""


def main() -> int:
    """Runs what the command line names and returns the exit status."""
    return run_command(start)


def start(args: list[str]) -> None:
    """Lists the commands, or runs the one that `args` begin with. Raises UserError if there is no such command."""
    name, *others = args or ["--help"]
    if name in ("-h", "--help"):
        print(listing())
        return
    if name not in (*COMMANDS, *MOVED):
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{name}': {hint}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`: a user's own rewards are looked for there
    sys.argv[1:] = others
    runpy.run_module(f"dgpo_fast.{name.replace('-', '_')}", run_name="__main__", alter_sys=True)


def listing() -> str:
    """The commands, one line each."""
    lines = "\n".join(f"  dgpo-fast {name:<14} {what}" for name, what in COMMANDS.items())
    return (
        f"Reinforce text-to-image diffusion models with DGPO.\n\n{lines}\n\n"
        "`dgpo-fast COMMAND --help` shows all settings of a command.\n"
        "Each command is also a module: `python -m dgpo_fast.train` is the first one."
    )


if __name__ == "__main__":
    raise SystemExit(main())
