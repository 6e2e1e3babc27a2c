"""`python -m dgpo_fast.train`: rollout → reward → advantage → update, on any machine."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgpo_fast.cli import INTERRUPTED, configure, print_help, run_command, take_option
from dgpo_fast.config import Config, flat, parse_overrides, read_yaml, resolve, to_dict, write_yaml
from dgpo_fast.errors import UserError

USAGE = """Reinforce a text-to-image diffusion model with Direct Group Preference Optimization.

  python -m dgpo_fast.train                               coloured shapes on the shipped pipeline
  python -m dgpo_fast.train tiny-ocr --iterations 100     another recipe, another length
  python -m dgpo_fast.train sd35m-ocr --prompts my.txt    Stable Diffusion 3.5-Medium
  python -m dgpo_fast.train my.yaml --optimizer.lr 1e-4   your own settings
  python -m dgpo_fast.train --resume runs/NAME            go on after Ctrl-C, a kill or a full disk"""


# What a resumed run may do otherwise. Anything else would compare before and after of different things.
MAY_CHANGE = (
    "iterations", "device", "precision", "optimizer.", "checkpoint.", "log.", "evaluation.every", "rollout.batch_size",
    "policy.micro_batch",
)  # fmt: skip


class StopSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop after the running step; the second one interrupts."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles both signals inside the block."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing this step, then saving; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)


def new_folder(config: Config) -> Path:
    """The folder of a new run, not yet made. Raises UserError where it is taken."""
    folder = Path(config.runs_dir) / (config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name, or go on with --resume {folder}")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{parent}: no run's folder can be made there; choose another --runs-dir")
    return folder


def resumed_config(folder: Path, args: list[str]) -> Config:
    """The configuration of the run in `folder`, with the command line's overrides."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {folder}: no run is there (it has no config.yaml)")
    settings = read_yaml(path)
    if not settings:
        raise UserError(f"--resume {folder}: its config.yaml is empty; put the settings of the run back")
    before = resolve(Config(), settings, str(path))
    after = resolve(before, parse_overrides(args), "command line")
    wanted = flat(after)
    for name, value in flat(before).items():
        if wanted[name] != value and not name.startswith(MAY_CHANGE):
            raise UserError(f"--resume {folder}: '{name}' cannot change within a run; start a new run for that")
    return after


def train(args: list[str]) -> int:
    """Trains as the command line says; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_help("dgpo_fast.train", USAGE, args)
        return 0
    resume = take_option(args, "resume")
    config = resumed_config(Path(resume), args) if resume else configure(args)
    folder = Path(resume) if resume else new_folder(config)

    from dgpo_fast.trainer import Trainer  # after the command line is known to be good: this import takes seconds

    trainer = Trainer(config)
    if resume:
        trainer.resume(folder)
    else:
        make_folder(folder)
    write_yaml(config, folder / "config.yaml")
    stop = StopSignal()
    with stop.installed():
        finished = fit(trainer, folder, stop)
    return 0 if finished else INTERRUPTED


def make_folder(folder: Path) -> None:
    """Makes the run's folder. Raises UserError where another run has made it in the meantime."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder} exists: choose another --name") from None


def fit(trainer: Any, folder: Path, stop: StopSignal) -> bool:
    """Evaluation, the training loop, evaluation. False where the run was asked to stop before its end."""
    config, console = trainer.config, trainer.console
    console.note(f"run: {folder}")
    try:
        before = trainer.evaluate_before(folder)
    except UserError:
        if trainer.iteration == 0:
            shutil.rmtree(folder)  # nothing was trained: no half-made folder is left
        raise
    trainer.save(folder)
    trainer.open_logs(folder, to_dict(config))
    console.start_training(trainer.iteration, config.iterations)
    try:
        loop(trainer, folder, stop)
    except KeyboardInterrupt:
        console.note(f"interrupted; go on from the last checkpoint with: {resume_command(folder)}")
        raise
    except Exception:
        trainer.save(folder)  # what came before the failed step is kept
        raise
    finally:
        console.stop_training()
    trainer.save(folder)
    if trainer.iteration < config.iterations:
        console.note(f"stopped after iteration {trainer.iteration}; go on with: {resume_command(folder)}")
        return False
    trainer.finish(folder, before)
    return True


def loop(trainer: Any, folder: Path, stop: StopSignal) -> None:
    """Iterations until the last one or a request to stop, with a checkpoint every so many."""
    config = trainer.config
    while trainer.iteration < config.iterations and not stop.requested:
        trainer.step()
        if trainer.iteration % config.checkpoint.every == 0:
            trainer.save(folder)


def resume_command(folder: Path) -> str:
    """What a user types to go on."""
    return f"python -m dgpo_fast.train --resume {folder}"


if __name__ == "__main__":
    raise SystemExit(run_command(train))
