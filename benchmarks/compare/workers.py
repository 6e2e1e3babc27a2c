"""Runs in processes of their own, some at a time, always the same number of them."""

import multiprocessing
import os
import queue
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.compare import child
from benchmarks.compare.run import Run, perform
from benchmarks.compare.systems import Scale
from dgpo_fast.errors import UserError

POLL_S = 0.5


def _perform(run: Run, home: Path, scale: Scale, device: str) -> dict[str, Any]:
    return perform(run, home, scale, device, lambda share: child.progress.put((run.name, share)), lambda: False)


def _accompany(run: Run, scale: Scale, device: str) -> dict[str, Any]:
    """Trains without a result, for as long as another run needs company."""
    with TemporaryDirectory() as scratch:
        return perform(run, Path(scratch), scale, device, lambda share: None, child.alone.is_set)


class Workers:
    """So many processes that do runs.

    All runs share the machine alike: if one is left alone, a process trains beside it and throws away what comes
    out, so that its seconds can be compared with those of the others.

    Args:
        home: the comparison's folder.
        scale: sizes of the runs.
        device: as in a run's settings.
        count: processes.
    """

    def __init__(self, home: Path, scale: Scale, device: str, count: int):
        self.home, self.scale, self.device, self.count = home, scale, device, count
        threads = max(1, (os.cpu_count() or 1) // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context = multiprocessing.get_context("spawn")
        self.progress, self.alone = context.Queue(), context.Event()
        self.pool = ProcessPoolExecutor(
            count, mp_context=context, initializer=child.start, initargs=(self.progress, self.alone, threads)
        )
        self.running: dict[Future, Run] = {}
        self.companions: set[Future] = set()

    def run_all(
        self,
        pick: Callable[[set[str]], Run | None],
        done: Callable[[Run, dict[str, Any]], None],
        show: Callable[[dict[str, float]], None],
    ) -> None:
        """Does what `pick` gives until it gives nothing and nothing runs.

        Args:
            pick: told the names of the running runs, gives the next one.
            done: told each finished run and its result.
            show: told the shares done of the running runs, again and again.
        """
        shares: dict[str, float] = {}
        while True:
            self._fill(pick)
            if not self.running:
                return
            finished, _ = wait([*self.running, *self.companions], timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in finished & self.running.keys():
                run = self.running.pop(future)
                shares.pop(run.name, None)
                done(run, _result(run, future))
            for future in finished & self.companions:
                self.companions.discard(future)
                _result(None, future)
            with suppress(queue.Empty):
                while True:
                    name, share = self.progress.get_nowait()
                    shares[name] = share
            show({run.name: shares.get(run.name, 0.0) for run in self.running.values()})

    def _fill(self, pick: Callable[[set[str]], Run | None]) -> None:
        """Starts runs while there are free processes, companions if there are no runs, and ends idle companions."""
        while len(self.running) < self.count:
            run = pick({run.name for run in self.running.values()})
            if run is None:
                break
            if len(self.running) + len(self.companions) == self.count:
                self._dismiss()
            self.running[self.pool.submit(_perform, run, self.home, self.scale, self.device)] = run
        if not self.running:
            self._dismiss()
        while self.running and len(self.running) + len(self.companions) < self.count:
            self.alone.clear()
            company = next(iter(self.running.values()))
            if company.kind in ("base", "draw"):
                return
            endless = Run("final", "dgpo", 10**6, company.lr, company.groups, seconds=10**9, marks=(1.0,))
            self.companions.add(self.pool.submit(_accompany, endless, self.scale, self.device))

    def _dismiss(self) -> None:
        self.alone.set()
        for future in self.companions:
            _result(None, future)
        self.companions.clear()

    def stop(self) -> None:
        """Ends all processes at once; a run that was under way goes on from its last evaluation another time."""
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()

    def close(self) -> None:
        """Ends the processes when they have nothing left to do."""
        self.pool.shutdown()


def _result(run: Run | None, future: Future) -> dict[str, Any]:
    what = run.name if run else "a companion"
    try:
        return future.result()
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except BrokenProcessPool:
        raise UserError(f"{what}: its process was killed; start the same command again to go on") from None
