"""`dgpo-fast` and `python -m dgpo_fast`: what commands there are, and the way into each of them.

A command runs as `python -m dgpo_fast.NAME` does. Nothing heavy is imported before it is known which one.
"""

import difflib
import os
import runpy
import sys

COMMANDS = {
    "train": "reinforce a model; with nothing else, the shipped one",
    "evaluate": "draw and score images of a model or a run, or two side by side",
    "profile": "show where the time of an iteration goes, on one page",
    "memory": "predict what a run holds on a GPU, and on which cards it fits",
    "recipes": "print all recipes as a table",
    "reward-server": "score images for runs on other machines",
}
MOVED = ("compare",)
"""Commands that only say where they are now."""


def main() -> int:
    """Runs the command that the command line names, and returns the exit status if the command does not itself."""
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(listing())
        return 0
    if name not in (*COMMANDS, *MOVED):
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: unknown command '{name}': {hint}", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`: a user's own rewards are looked for there
    sys.argv[1:] = args
    runpy.run_module(f"dgpo_fast.{name.replace('-', '_')}", run_name="__main__", alter_sys=True)
    return 0


def listing() -> str:
    """The commands, one line each."""
    lines = "\n".join(f"  dgpo-fast {name:<14} {what}" for name, what in COMMANDS.items())
    return (
        f"Reinforce text-to-image diffusion models with DGPO.\n\n{lines}\n\n"
        "`dgpo-fast COMMAND --help` shows all settings of a command. Each is a module too:\n"
        "`python -m dgpo_fast.train` is `dgpo-fast train`."
    )


if __name__ == "__main__":
    raise SystemExit(main())
