"""`python -m dgpo_fast.merge`: a LoRA merged into a model, as a pipeline's folder."""

from dgpo_fast.config.command_line import run_command
from dgpo_fast.models.merge import merge_command

if __name__ == "__main__":
    raise SystemExit(run_command(merge_command))
