"""Signals that ask a run to stop."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Ctrl-C, a kill, a lost terminal, and Slurm's warning before the time limit; the last two not on every platform."""


class StopSignal:
    """Turns the first signal into a request to stop after the running step; the second one interrupts.

    A signal that was ignored when the process started stays ignored, such as SIGHUP under `nohup`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.requested = False
        self.quiet = quiet

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals inside the block."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in heard}
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
