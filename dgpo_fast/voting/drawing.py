"""Draws the groups of a vote in a thread, ahead of the person who judges them."""

import os
import threading
import time

from PIL import Image

from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.drawer import Drawer
from dgpo_fast.run.console import Console
from dgpo_fast.seeds import stream_seed
from dgpo_fast.voting.folder import VoteFolder
from dgpo_fast.wording import FAULTS, one_line

FOLLOW_S = 60.0
"""Most seconds that a forward may take until a stop is heard."""


class _Stopped(Exception):
    """The page has been closed."""


class GroupDrawing:
    """The groups that are still to be drawn.

    Args:
        folder: of the vote.
        drawer: draws; None if all groups are there.
        console: shows the progress.
        seed: of the initial noise. A picture's noise only depends on it and the picture's number.

    Attributes:
        drawn: how many groups, from the first on, are there.
        fault: why no more are drawn; empty if nothing is wrong.
    """

    def __init__(self, folder: VoteFolder, drawer: Drawer | None, console: Console, seed: int):
        self.folder, self.drawer, self.console = folder, drawer, console
        self.seed = stream_seed(seed, "votes")
        self.drawn, self.fault = folder.drawn_groups(), ""
        self._first, self._started_s = self.drawn, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drawing")

    @property
    def left_s(self) -> float | None:
        """Seconds until all are drawn; None if there is no telling."""
        done, left = self.drawn - self._first, len(self.folder.prompts) - self.drawn
        if left == 0 or self.fault:
            return 0.0
        return left * (time.monotonic() - self._started_s) / done if done else None

    def start(self) -> None:
        """Begins to draw, if anything is missing."""
        self._started_s = time.monotonic()
        if self.drawer is not None:
            self._thread.start()

    def close(self) -> None:
        """Ends after the step that is being computed; a group that is not whole is drawn again by the next start."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(FOLLOW_S)

    def _run(self) -> None:
        total = len(self.folder.prompts)
        try:
            with self.console.count("groups", total, done=self.drawn) as on_groups:
                while self.drawn < total:
                    self._draw(self.drawn)
                    self.drawn += 1
                    on_groups(self.drawn)
        except _Stopped:
            pass
        except UserError as error:
            self.fault = str(error)
        except Exception as error:  # whatever a GPU may raise: the votes go on with what is there
            self.fault = f"drawing failed: {one_line(f'{type(error).__name__}: {error}')}"

    def _draw(self, group: int) -> None:
        assert self.drawer is not None
        prompt, number = self.folder.prompts[group], self.folder.numbers(group).start
        prompts = [prompt] * self.folder.group_size
        for x0 in self.drawer.latents(prompts, first=number, seed=self.seed, on_step=self._on_step):
            images, faults = self.drawer.sampler.decode(x0)
            if faults.any():
                fault = FAULTS[next(filter(None, faults.tolist()))]
                remedy = finite_remedy(self.drawer.sampler.dtype, begun=False)
                raise UserError(f"picture {number} of {prompt.text!r} is not finite: {fault}: {remedy}")
            for image in images:
                file = self.folder.picture(number)
                staged = file.with_name(f".{file.name}")
                Image.fromarray(image).save(staged, compress_level=4)
                os.replace(staged, file)
                number += 1

    def _on_step(self, share: float) -> None:
        if self._stop.is_set():
            raise _Stopped
