"""Ctrl-C and SIGTERM as requests."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
