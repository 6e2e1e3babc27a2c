"""`python -m dgpo_fast.export`: a trained run with a model card, as a folder or as a model on the hub."""

from dgpo_fast.config.command_line import run_command
from dgpo_fast.publishing.command import export_command

if __name__ == "__main__":
    raise SystemExit(run_command(export_command))
