"""`python -m dgpo_fast.vote`: a page to judge pictures on, and the preferences that a run learns from."""

from dgpo_fast.config.command_line import run_command
from dgpo_fast.voting.command import vote

if __name__ == "__main__":
    raise SystemExit(run_command(vote))
