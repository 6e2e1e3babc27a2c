"""`python -m dgpo_fast.profile`: where an iteration's time goes, on one page."""

from dgpo_fast.config.command_line import leave, run_command
from dgpo_fast.profiling.command import profile

if __name__ == "__main__":
    leave(run_command(profile))
