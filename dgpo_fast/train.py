"""`python -m dgpo_fast.train`: rollout → reward → advantage → update, on any machine."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgpo_fast.cli import INTERRUPTED, configure, print_help, run_command, take_option
from dgpo_fast.config import Config, parse_overrides, read_yaml, resolve, to_dict, write_yaml
from dgpo_fast.errors import UserError

USAGE = """Reinforce a text-to-image diffusion model with Direct Group Preference Optimization.

  python -m dgpo_fast.train                               coloured shapes on the shipped pipeline
  python -m dgpo_fast.train tiny-ocr --iterations 100     another recipe, another length
  python -m dgpo_fast.train sd35m-ocr --prompts my.txt    Stable Diffusion 3.5-Medium
  python -m dgpo_fast.train my.yaml --optimizer.lr 1e-4   your own settings
  python -m dgpo_fast.train --resume runs/NAME            go on after Ctrl-C, a kill or a full disk"""


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
    return folder


def resumed_config(folder: Path, args: list[str]) -> Config:
    """The configuration of the run in `folder`, with the command line's overrides."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--resume {folder}: no run is there (it has no config.yaml)")
    return resolve(resolve(Config(), read_yaml(path), str(path)), parse_overrides(args), "command line")


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
    folder.mkdir(parents=True, exist_ok=bool(resume))
    write_yaml(config, folder / "config.yaml")
    stop = StopSignal()
    with stop.installed():
        finished = fit(trainer, folder, stop)
    return 0 if finished else INTERRUPTED


def fit(trainer: Any, folder: Path, stop: StopSignal) -> bool:
    """Evaluation, the training loop, evaluation. False where the run was asked to stop before its end."""
    config, console = trainer.config, trainer.console
    console.note(f"run: {folder}")
    before = trainer.evaluate_before(folder)
    trainer.open_logs(folder, to_dict(config))
    console.start_training(trainer.iteration, config.iterations)
    try:
        while trainer.iteration < config.iterations and not stop.requested:
            try:
                trainer.step()
            except UserError:
                trainer.save(folder)  # a step that fails has changed nothing: what came before it is kept
                raise
            if trainer.iteration % config.checkpoint.every == 0 and trainer.iteration < config.iterations:
                trainer.save(folder)
    finally:
        console.stop_training()
    trainer.save(folder)
    if trainer.iteration < config.iterations:
        console.note(f"stopped after iteration {trainer.iteration}; go on with: "
                     f"python -m dgpo_fast.train --resume {folder}")  # fmt: skip
        return False
    trainer.finish(folder, before)
    return True


if __name__ == "__main__":
    raise SystemExit(run_command(train))
