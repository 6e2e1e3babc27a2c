"""`python -m dgpo_fast.reward_server`: rewards for runs on other machines, or in other environments."""

from dgpo_fast.config.command_line import run_command
from dgpo_fast.rewards.serving.server import serve

if __name__ == "__main__":
    raise SystemExit(run_command(serve))
