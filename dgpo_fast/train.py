"""`python -m dgpo_fast.train`: rollout → reward → advantage → update, on any machine."""

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgpo_fast.config import Config
from dgpo_fast.config.command_line import INTERRUPTED, configure, launched_with_others, leave, run_command, take_option
from dgpo_fast.config.help import print_help
from dgpo_fast.config.reading import flat, parse_overrides, read_yaml, resolve, to_dict, write_yaml
from dgpo_fast.errors import UserError
from dgpo_fast.run.folder import LOCK, FolderLock, read_lock
from dgpo_fast.run.search import runs_there
from dgpo_fast.wording import resume_command

USAGE = """Reinforce a text-to-image diffusion model with Direct Group Preference Optimization.

  python -m dgpo_fast.train                               coloured shapes, with the shipped small pipeline
  python -m dgpo_fast.train tiny-ocr --iterations 100     another recipe, for 100 iterations
  python -m dgpo_fast.train sd35m-ocr --prompts my.txt    Stable Diffusion 3.5-Medium, on your own prompts
  python -m dgpo_fast.train my.yaml --optimizer.lr 1e-4   your own settings, with another learning rate
  python -m dgpo_fast.train --resume runs/NAME            resume a run after Ctrl-C, a kill or a full disk

--resume RUN reads the settings from the run's folder. Some of them can be changed on the command line
(docs/recipes.md): --iterations 200 trains a finished run further. --config FILE.yaml also names a settings file."""


# What a resumed run may do otherwise. Anything else would compare before and after of different things.
MAY_CHANGE = (
    "iterations",
    "device",
    "precision",
    "optimizer.",
    "engine.",
    "checkpoint.",
    "distributed.",
    "log.",
    "evaluation.every",
    "rollout.batch_size",
    "policy.micro_batch",
    "policy.behaviour",
    "ema.offload",
    "max_lost_iterations",
    "reward_workers",
    "reward_deadline_s",
    "prompt_cache",
    "low_memory",
)
MUST_STAY = ("optimizer.name",)  # its state is another's


class StopSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop after the running step; the second one interrupts."""

    def __init__(self, quiet: bool = False) -> None:
        self.requested = False
        self.quiet = quiet

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
        if self.quiet:
            return
        print("\nfinishing this step, then saving; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)


def new_folder(config: Config) -> Path:
    """The folder of a new run, not yet made. Raises UserError where it is taken or would lie elsewhere."""
    if config.name and (".." in config.name or {"/", "\\"} & set(config.name)):
        raise UserError(f"--name {config.name}: is a path: leave out '/', '\\' and '..'; --runs-dir says where runs go")
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
        raise UserError(f"--resume {folder}: no run is there (it has no config.yaml){runs_there(str(folder))}")
    settings = read_yaml(path)
    if not settings:
        raise UserError(f"--resume {folder}: its config.yaml is empty; put the settings of the run back")
    before = resolve(Config(), settings, str(path))
    after = resolve(before, parse_overrides(args), "command line")
    wanted = flat(after)
    for name, value in flat(before).items():
        if wanted[name] != value and (name in MUST_STAY or not name.startswith(MAY_CHANGE)):
            raise UserError(f"--resume {folder}: '{name}' cannot change within a run; start a new run for that")
    _require_effect(folder, before, after)
    return after


def _require_effect(folder: Path, before: Config, after: Config) -> None:
    """Raises UserError where a resumed run would train nothing, and other settings than before would mean nothing.

    The number of iterations that are done is allowed: it ends the run there. So are other settings, such as the device,
    where a run has yet to make its results.
    """
    done = iterations_done(folder) or 0
    if after.iterations < done:
        raise UserError(f"{folder} has done {done} iterations already: give --iterations {done} or more")
    changed = flat(replace(after, iterations=before.iterations)) != flat(before)
    if after.iterations == done and changed and (folder / "summary.json").exists():
        raise UserError(f"{folder}: all {done} iterations are done: --iterations N goes on")


def train(args: list[str]) -> int:
    """Trains as the command line says; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_help(USAGE, args)
        return 0
    # Alone, a wrong command line is refused before the imports below, which take seconds.
    start = None if launched_with_others() else read_start(args)

    from dgpo_fast.distributed import connect
    from dgpo_fast.trainer import Trainer

    processes = connect()
    # Process 0 decides for all, so that the others need neither the settings nor the run's folder on their disks.
    with processes.together("the settings"):
        if processes.first and start is None:
            start = read_start(args)
    config, folder, resumed = shared_start(start, processes)
    processes.set_timeout(config.distributed.timeout_s)
    with processes.together("the set-up of all processes"):
        trainer = Trainer(config, processes)
    with processes.together("the run's folder"):
        if processes.first:
            lock = open_folder(trainer.config, folder, resumed)
    if resumed:
        trainer.resume(folder)
        with processes.together("the run's settings"):
            if processes.first and trainer.iteration < trainer.config.iterations:
                write_yaml(trainer.config, folder / "config.yaml")  # else no iteration will use them
    with processes.together("the encoded prompts"):
        trainer.encode_prompts()
    stop = StopSignal(quiet=not processes.first)
    try:
        with stop.installed():
            finished = fit(trainer, folder, stop, resumed)
    finally:
        trainer.close()
        if processes.first:
            lock.release()
    processes.close()
    return 0 if finished else INTERRUPTED


@dataclass(frozen=True)
class Start:
    """What a command line asks for: the settings, the run's folder, and whether a run there is gone on with."""

    config: Config
    folder: Path
    resumed: bool


def read_start(args: list[str]) -> Start:
    """What `args` ask for; where torchrun starts a run again, to go on with it."""
    args = list(args)
    resume = take_option(args, "resume")
    if resume:
        if args and not args[0].startswith("-"):
            raise UserError(f"--resume takes its settings from the run: leave '{args[0]}' out")
        config = resumed_config(Path(resume), args)
        if iterations_done(Path(resume)) is None:
            raise UserError(f"{Path(resume) / 'checkpoints'}: no valid checkpoint to resume from")
        return Start(config, Path(resume), True)
    config = configure(args)
    begun = begun_before(config)
    if begun is None:
        return Start(config, new_folder(config), False)
    if iterations_done(begun) is None:
        FolderLock(begun).release()  # raises where a process is at work in it
        shutil.rmtree(begun)  # it ended before its first checkpoint: there is nothing to go on from
        return Start(config, begun, False)
    return Start(resumed_config(begun, []), begun, True)


def iterations_done(folder: Path) -> int | None:
    """The iteration of the newest checkpoint in `folder`, be it valid or not; None before the first one."""
    numbers = (path.name.removeprefix("iteration-") for path in (folder / "checkpoints").glob("iteration-*"))
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def launcher_id() -> str | None:
    """Names the torchrun that started this process, the same after each of its restarts; None without one."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()}:{os.getppid()}"


def begun_before(config: Config) -> Path | None:
    """The folder of the run that this torchrun began before it restarted its processes.

    Or that an earlier torchrun began with the same `--rdzv-id`, `--name` and settings, as where a cluster's manager
    starts a job again.
    """
    launcher = launcher_id()
    if launcher is None:
        return None
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    for path in Path(config.runs_dir).glob(f"*/{LOCK}"):
        folder = path.parent
        if read_lock(folder).get("launcher") == launcher and (restarted or is_same_job(config, folder)):
            return folder
    return None


def is_same_job(config: Config, folder: Path) -> bool:
    """Whether `config` is what the run in `folder` began with, its name included."""
    if config.name != folder.name or os.environ.get("TORCHELASTIC_RUN_ID", "none") == "none":
        return False
    begun = flat(resolve(Config(), read_yaml(folder / "config.yaml"), str(folder)))
    return all(value in (begun[name], "auto") for name, value in flat(config).items())


def shared_start(start: Start | None, processes: Any) -> tuple[Config, Path, bool]:
    """Process 0's settings, folder and whether it is resumed, on every process."""
    mine = None if start is None else [to_dict(start.config), str(start.folder), start.resumed]
    settings, folder, resumed = processes.broadcast(mine, "the settings")
    return resolve(Config(), settings, "process 0"), Path(folder), resumed


def open_folder(config: Config, folder: Path, resumed: bool) -> FolderLock:
    """Makes the folder of a new run, with its settings in it, and takes the run's folder for this process.

    Raises UserError where another run has it.
    """
    if not resumed:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{folder} exists: choose another --name") from None
    lock = FolderLock(folder, {"launcher": launcher_id()})
    if not resumed:
        write_yaml(config, folder / "config.yaml")
    return lock


def fit(trainer: Any, folder: Path, stop: StopSignal, resumed: bool) -> bool:
    """Evaluation, the training loop, evaluation. False where the run was asked to stop before its end."""
    config, console = trainer.config, trainer.console
    console.note(f"run: {folder}")
    try:
        before = trainer.evaluate_before(folder)
    except UserError:
        if not resumed and trainer.processes.first:
            shutil.rmtree(folder)  # nothing was trained: no half-made folder is left
        raise
    trainer.save(folder)
    trainer.prepare(folder, lambda: stop.requested)
    trainer.open_logs(folder, to_dict(config))
    console.start_training(trainer.iteration, config.iterations)
    try:
        loop(trainer, folder, stop)
    except KeyboardInterrupt:
        console.note(f"interrupted; go on from the last checkpoint with: {resume_command(folder)}")
        raise
    except Exception as error:
        trainer.save(folder, after=error)  # what came before the failed step is kept
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
    while trainer.iteration < config.iterations and not trainer.anyone(stop.requested):
        trainer.step()
        if trainer.iteration % config.checkpoint.every == 0:
            trainer.save(folder, wait=False)


if __name__ == "__main__":
    leave(run_command(train))
