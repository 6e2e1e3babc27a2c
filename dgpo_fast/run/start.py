"""How a run starts: which settings, in which folder, and whether it is resumed."""

import os
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dgpo_fast.config.command_line import configure, take_option
from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import flat, parse_overrides, read_yaml, resolve, to_dict, write_yaml
from dgpo_fast.config.resuming import listed, may_change
from dgpo_fast.errors import UserError
from dgpo_fast.run.folder import LOCK, FolderLock, read_lock
from dgpo_fast.run.search import runs_there

if TYPE_CHECKING:
    from dgpo_fast.distributed import Processes

ASKED = "asked"
"""In the note of a run's lock: the settings as its command gave them, before the model and the card completed them."""


@dataclass(frozen=True)
class Start:
    """What a command line asks for: the settings, the run's folder, and whether a run there is resumed."""

    config: Config
    folder: Path
    resumed: bool


def read_start(args: list[str]) -> Start:
    """What `args` ask for. If torchrun has restarted the processes of a run, they ask to resume it."""
    args = list(args)
    resume = take_option(args, "resume")
    if resume:
        resume = os.path.expanduser(resume)
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
        FolderLock(begun).release()  # raises if a process is at work in it
        shutil.rmtree(begun)  # it ended before its first checkpoint: there is nothing to go on from
        return Start(config, begun, False)
    return Start(resumed_config(begun, []), begun, True)


def iterations_done(folder: Path) -> int | None:
    """The iteration of the newest checkpoint in `folder`, valid or not; None before the first one."""
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

    Or that an earlier torchrun began with the same `--rdzv-id`, `--name` and settings, for example because a
    cluster's manager restarted the job.
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
    """Whether `config`, including its name, is what the run in `folder` began with."""
    if config.name != folder.name or os.environ.get("TORCHELASTIC_RUN_ID", "none") == "none":
        return False
    return read_lock(folder).get(ASKED) == to_dict(config)


def shared_start(start: Start | None, processes: "Processes") -> Start:
    """Process 0's start, on every process."""
    mine = None if start is None else [to_dict(start.config), str(start.folder), start.resumed]
    settings, folder, resumed = processes.broadcast(mine, "the settings")
    return Start(resolve(Config(), settings, "process 0"), Path(folder), resumed)


def open_folder(config: Config, start: Start) -> FolderLock:
    """Makes the folder of a new run, with its settings, and locks the run's folder for this process.

    Args:
        config: the settings that the run keeps.
        start: what its command asked for.

    Raises UserError if another run has it.
    """
    folder = start.folder
    if not start.resumed:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{folder} exists: choose another --name") from None
    asked = read_lock(folder).get(ASKED) if start.resumed else to_dict(start.config)
    lock = FolderLock(folder, {"launcher": launcher_id(), ASKED: asked})
    if not start.resumed:
        write_yaml(config, folder / "config.yaml")
    return lock


def new_folder(config: Config) -> Path:
    """The folder of a new run, not yet made. Raises UserError if it exists or would not be in `runs_dir`."""
    if config.name and (".." in config.name or {"/", "\\"} & set(config.name)):
        raise UserError(f"--name {config.name}: is a path: leave out '/', '\\' and '..'; --runs-dir says where runs go")
    folder = Path(config.runs_dir) / (config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name, or continue it with --resume {folder}")
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
        raise UserError(f"--resume {folder}: its config.yaml is empty; restore the run's settings")
    before = resolve(Config(), settings, str(path))
    after = resolve(before, parse_overrides(args), "command line")
    wanted = flat(after)
    for name, value in flat(before).items():
        if wanted[name] != value and not may_change(name, value, wanted[name]):
            raise UserError(
                f"--resume {folder}: '{name}' cannot change within a run: start a new run for that; what can change is "
                f"{listed().replace('`', '')}"
            )
    _require_effect(folder, before, after)
    return after


def _require_effect(folder: Path, before: Config, after: Config) -> None:
    """Raises UserError if a resumed run would train nothing, so that changed settings would have no effect.

    The number of finished iterations is allowed: it ends the run there. Changed settings, such as the device, are
    allowed if the run still has to make its results.
    """
    done = iterations_done(folder) or 0
    if after.iterations < done:
        raise UserError(f"{folder} has done {done} iterations already: give --iterations {done} or more")
    changed = flat(replace(after, iterations=before.iterations)) != flat(before)
    if after.iterations == done and changed and (folder / "summary.json").exists():
        raise UserError(f"{folder}: all {done} iterations are done: give a larger --iterations to train further")
