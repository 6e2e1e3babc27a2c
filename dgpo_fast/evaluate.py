"""`python -m dgpo_fast.evaluate`: images and scores of a pipeline or a run, and two of them side by side."""

from dgpo_fast.config.command_line import run_command
from dgpo_fast.evaluation.command import evaluate

if __name__ == "__main__":
    raise SystemExit(run_command(evaluate))
