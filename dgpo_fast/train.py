"""`python -m dgpo_fast.train`: rollout → reward → advantage → update, on any machine."""

from dgpo_fast.config.command_line import INTERRUPTED, launched_with_others, leave, run_command
from dgpo_fast.config.help import print_help
from dgpo_fast.run.start import read_start, shared_start

USAGE = """Reinforce a text-to-image diffusion model with Direct Group Preference Optimization.

  python -m dgpo_fast.train                               coloured shapes, with the shipped small pipeline
  python -m dgpo_fast.train tiny-ocr --iterations 100     another recipe, for 100 iterations
  python -m dgpo_fast.train sd35m-ocr --prompts my.txt    Stable Diffusion 3.5-Medium, on your own prompts
  python -m dgpo_fast.train my.yaml --optimizer.lr 1e-4   your own settings, with another learning rate
  python -m dgpo_fast.train --resume runs/NAME            resume a run after Ctrl-C, a kill or a full disk

--resume RUN reads the settings from the run's folder. Some of them can be changed on the command line
(docs/recipes.md): --iterations 200 trains a finished run further. --config FILE.yaml also names a settings file."""


def train(args: list[str]) -> int:
    """Runs the command line's training; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_help(USAGE, args)
        return 0
    # Alone, a wrong command line is refused before the imports below, which take seconds.
    start = None if launched_with_others() else read_start(args)

    from dgpo_fast.distributed import connect
    from dgpo_fast.lifecycle import set_up, train_to_the_end

    processes = connect()
    # Process 0 decides for all, so that the others need neither the settings nor the run's folder on their disks.
    with processes.together("the settings"):
        if processes.first and start is None:
            start = read_start(args)
    start = shared_start(start, processes)
    with set_up(start.config, processes) as trainer:
        finished = train_to_the_end(trainer, start)
    processes.close()
    return 0 if finished else INTERRUPTED


if __name__ == "__main__":
    leave(run_command(train))
