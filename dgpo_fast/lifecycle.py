"""The life of a run: set-up, steps, results. Training, profiling and comparing share it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dgpo_fast.build import build
from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import to_dict, write_yaml
from dgpo_fast.distributed import ALONE, Processes, SharedError
from dgpo_fast.errors import UserError
from dgpo_fast.pages.live import LivePage
from dgpo_fast.records import JsonObject
from dgpo_fast.run.start import Start, open_folder
from dgpo_fast.run.stop_signal import StopSignal
from dgpo_fast.trainer import Trainer
from dgpo_fast.wording import counted, one_line, resume_command


@contextmanager
def set_up(config: Config, processes: Processes = ALONE) -> Iterator[Trainer]:
    """The trainer of `config`, made by all processes together and closed at the block's end."""
    processes.set_timeout(config.distributed.timeout_s)
    with processes.together("the set-up of all processes"):
        trainer = Trainer(build(config, processes))
    try:
        yield trainer
    finally:
        trainer.close()


@contextmanager
def stepping(
    trainer: Trainer, folder: Path, should_stop: Callable[[], bool], settings: JsonObject | None = None
) -> Iterator[None]:
    """Prepares `trainer` for the steps in the block: offline groups are drawn, and logs and progress are open.

    Args:
        trainer: its prompts are encoded, or are encoded when they are needed.
        folder: the run's.
        should_stop: asked now and then; True ends the drawing.
        settings: for loggers that show them; None keeps the trainer's own sinks (`Trainer.log_to`).
    """
    trainer.prepare(folder, should_stop)
    if settings is not None:
        trainer.open_logs(folder, settings)
    trainer.console.start_training(trainer.iteration, trainer.config.iterations)
    try:
        yield
    finally:
        trainer.console.stop_training()


def train_to_the_end(trainer: Trainer, start: Start) -> bool:
    """Runs the training from its folder to its results. False if it was asked to stop early."""
    processes, folder, lock = trainer.processes, start.folder, None
    with processes.together("the run's folder"):
        if processes.first:
            lock = open_folder(trainer.config, start)
    try:
        if start.resumed:
            trainer.resume(folder)
            with processes.together("the run's settings"):
                if processes.first and trainer.iteration < trainer.config.iterations:
                    write_yaml(trainer.config, folder / "config.yaml")  # else no iteration will use them
        with processes.together("the encoded prompts"):
            trainer.encode_prompts()
        stop = StopSignal(quiet=not processes.first)
        with stop.installed():
            return fit(trainer, folder, stop, start.resumed)
    finally:
        if lock is not None:
            lock.release()


def fit(trainer: Trainer, folder: Path, stop: StopSignal, resumed: bool) -> bool:
    """Evaluates, trains, evaluates, and shows it on the run's page. False if the run was asked to stop early; a rule
    of its looks that stops it is an end like any other."""
    first, evaluated = trainer.processes.first, trainer.prompts.evaluated
    page = LivePage(folder, trainer.config, trainer.console, evaluated, trainer.iteration, quiet=not first)
    resume = f"resume with: {resume_command(folder)}"
    try:
        finished = _fit(trainer, folder, stop, resumed, page)
    except BaseException as error:
        why = "Interrupted" if isinstance(error, KeyboardInterrupt) else f"Ended by an error ({one_line(error)})"
        page.say(f"{why} after {counted(trainer.iteration, 'iteration')}; {resume}", live=False)
        raise
    ended = counted(trainer.iteration, "iteration")
    page.say(f"Finished after {ended}" if finished else f"Stopped after {ended}; {resume}", live=False)
    return finished


def _fit(trainer: Trainer, folder: Path, stop: StopSignal, resumed: bool, page: LivePage) -> bool:
    config, console = trainer.config, trainer.console
    console.note(f"run: {folder}")
    page.say("Evaluating the original model")
    try:
        before = trainer.evaluations.before(folder)
        trainer.watch.begin(folder, trainer.iteration)
        trainer.checkpoints.good = trainer.watch.good
    except UserError:
        if not resumed and trainer.processes.first:
            shutil.rmtree(folder)  # nothing was trained: no half-made folder is left
        raise
    page.before = None if before is None else before.summary()
    page.say("Preparing to train")
    trainer.save(folder)
    with stepping(trainer, folder, lambda: stop.requested, to_dict(config)):
        trainer.sinks = (*trainer.sinks, page.write)
        try:
            loop(trainer, folder, stop)
        except KeyboardInterrupt:
            console.note(f"interrupted; resume from the last checkpoint with: {resume_command(folder)}")
            raise
        except Exception as error:
            # What came before the failed step is kept. Of sharded weights, if all processes have raised this error.
            trainer.save(folder, everyone_comes=isinstance(error, SharedError))
            raise
    trainer.save(folder)
    if trainer.watch.stopped:
        trainer.checkpoints.restore(folder, trainer.watch.good)
        console.note(f"the run ends with the weights of iteration {trainer.iteration}, the last good checkpoint")
    elif trainer.iteration < config.iterations:
        console.note(f"stopped after iteration {trainer.iteration}; resume with: {resume_command(folder)}")
        return False
    page.say("Evaluating the trained model")
    trainer.finish(folder, before)
    if trainer.loggers is not None:
        trainer.loggers.write_pictures(trainer.iteration)
    return True


def loop(trainer: Trainer, folder: Path, stop: StopSignal) -> None:
    """Runs iterations until the last one or a request to stop, with a checkpoint every `checkpoint.every` of them."""
    config = trainer.config
    while trainer.iteration < config.iterations and not trainer.anyone(stop.requested or trainer.watch.stopped):
        trainer.step()
        if trainer.iteration % config.checkpoint.every == 0:
            trainer.save(folder, wait=False)
