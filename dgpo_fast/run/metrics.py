"""Numbers of a run: `metrics.jsonl`, seconds per phase, and the optional loggers."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dgpo_fast.config.options import Log
from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.run.pictures import NewPictures
from dgpo_fast.wording import one_line

Logger = Callable[[Metrics], None]
PictureLogger = Callable[[Mapping[str, Path], int], None]
WANDB_ID = "wandb_id.txt"
"""In a run's folder: the W&B run that it logs to, after it is resumed too."""


class Phases:
    """Seconds spent in each phase of an iteration; waits for the GPU at a phase's ends, so that they add up.

    Attributes:
        watch: a context entered around each phase with its name; a profiler sets its own.
        current: the current phase, or the one that an error has ended; None between phases.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.current: str | None = None
        self.watch: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, self.current = self._now(), name
        with self.watch(name):
            yield
            end = self._now()
        self.current = None
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start

    def take(self) -> dict[str, float]:
        """`{"rollout_s": …}` since the last call."""
        taken = {f"{name}_s": round(seconds, 6) for name, seconds in self.seconds.items()}
        self.seconds = {}
        return taken

    def _now(self) -> float:
        if self.device.type == "cuda":
            # Not for the whole GPU: what rewards compute beside the trainer's work may take longer.
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


def peak_memory_mib(device: torch.device) -> float | None:
    """Most GPU memory allocated so far, in MiB; None without a GPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


class MetricsFile:
    """`metrics.jsonl`: one line per iteration, each whole on disk before the next begins.

    Args:
        path: the file.
        until: keep only lines of iterations up to this one, as when a run resumes from an earlier checkpoint.
    """

    def __init__(self, path: Path, until: int = 0):
        kept = [line for line in read_metrics(path) if line["iteration"] <= until] if path.exists() else []
        staged = path.with_suffix(".tmp")
        staged.write_text("".join(json_line(line) for line in kept), encoding="utf-8")
        staged.replace(path)
        self.path = path
        self.file = path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        """Appends one line; NaN and infinity become null, which JSON has.

        Raises UserError if the file was removed, since what is written would be lost silently.
        """
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise UserError(f"{self.path} was removed during the run: its folder is gone; start the run again")
        self.file.write(json_line(metrics))
        self.file.flush()


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError:
        raise UserError(f"{path}: a line is damaged; fix or remove it") from None


def write_json(path: Path, value: JsonObject) -> None:
    """Writes `value` as indented JSON in one step: the file is the old one or the new one."""
    staged = path.with_name(f".{path.name}")
    staged.write_text(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    staged.replace(path)


class Loggers:
    """TensorBoard and Weights & Biases, if asked for. One that fails is left out with a note and never ends the run.

    Args:
        log: which are wanted.
        folder: the run's folder.
        config: the run's settings, for loggers that show them.
        note: called with one line if a logger is left out.
        until: as of `MetricsFile`; TensorBoard hides what was logged after this iteration.
    """

    def __init__(self, log: Log, folder: Path, config: JsonObject, note: Callable[[str], None], until: int = 0):
        self.note = note
        self.loggers: dict[str, tuple[Logger, Callable[[], object]]] = {}
        self.showing: dict[str, PictureLogger] = {}
        self.pictures = NewPictures(folder)
        if log.tensorboard:
            self._try("TensorBoard", lambda: self._add("TensorBoard", *_tensorboard(folder, until)))
        if log.wandb is not None:
            self._try("W&B", lambda: self._add("W&B", *_wandb(log, folder, config)))

    def write(self, metrics: Metrics) -> None:
        """Hands one iteration's metrics on, and the pictures that are new."""
        for name, (write, _) in list(self.loggers.items()):
            self._try(name, lambda write=write: write(metrics))  # type: ignore[misc]
        self.write_pictures(metrics["iteration"])

    def write_pictures(self, iteration: int) -> None:
        """Hands the pictures in the run's folder on that are new since the last call."""
        new = self.pictures.take() if self.showing else {}
        for name, show in list(self.showing.items()) if new else ():
            try:
                show(new, iteration)
            except Exception as error:  # as below; without pictures, it still has the numbers
                self.showing.pop(name)
                self.note(f"{name} gets no more pictures: {one_line(f'{type(error).__name__}: {error}')}")

    def close(self) -> None:
        """Has everything written that the loggers hold back: without it, the end of a run is missing there."""
        for name, (_, close) in list(self.loggers.items()):
            self._try(name, close)
        self.loggers.clear()

    def _add(self, name: str, write: Logger, show: PictureLogger, close: Callable[[], object]) -> None:
        self.loggers[name], self.showing[name] = (write, close), show

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # another project's logger may fail in any way; metrics.jsonl has everything
            self.loggers.pop(name, None)
            self.showing.pop(name, None)
            self.note(f"{name} is off: {one_line(f'{type(error).__name__}: {error}')}")


def _tensorboard(folder: Path, until: int) -> tuple[Logger, PictureLogger, Callable[[], object]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=until + 1 if until else None)

    def log(metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, metrics["iteration"])
        writer.flush()

    def show(pictures: Mapping[str, Path], iteration: int) -> None:
        for name, path in pictures.items():
            with Image.open(path) as picture:
                writer.add_image(name, np.asarray(picture.convert("RGB")), iteration, dataformats="HWC")

    return log, show, writer.close


def _wandb(log: Log, folder: Path, config: JsonObject) -> tuple[Logger, PictureLogger, Callable[[], object]]:
    import wandb

    known = folder / WANDB_ID
    run_id = known.read_text(encoding="utf-8").strip() or None if known.is_file() else None
    run = wandb.init(
        project=log.wandb,
        dir=str(folder),
        name=folder.name,
        config=config,
        id=run_id,
        resume="allow" if run_id else None,
    )
    known.write_text(f"{run.id}\n", encoding="utf-8")

    def show(pictures: Mapping[str, Path], iteration: int) -> None:
        run.log({name: wandb.Image(str(path)) for name, path in pictures.items()}, step=iteration)

    return lambda metrics: run.log(metrics, step=metrics["iteration"]), show, run.finish


def json_line(metrics: Metrics) -> str:
    """One line of JSON with its end; NaN and infinity become null."""
    return json.dumps(finite(metrics), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: object) -> object:
    """`value` with NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
