"""`python -m dgpo_fast.recipes`: every recipe as a table."""

from dgpo_fast.config.command_line import run_command
from dgpo_fast.config.recipe_table import markdown_table
from dgpo_fast.errors import UserError

USAGE = "Print all recipes as a Markdown table. There is nothing to set."


def recipes(args: list[str]) -> None:
    """Prints the table."""
    if args and args[0] not in ("-h", "--help"):
        raise UserError(f"command line: unexpected '{args[0]}': the table of recipes has no settings")
    print(USAGE if args else markdown_table())


if __name__ == "__main__":
    raise SystemExit(run_command(recipes))
