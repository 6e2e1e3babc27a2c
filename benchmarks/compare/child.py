"""What a process that does runs starts with: first of all it silences the libraries that everything else imports."""

import signal
from typing import Any

from dgpo_fast.config.command_line import quieten_libraries

progress: Any = None
"""A queue: told (name of a run, share done)."""
alone: Any = None
"""An event: set when a run that accompanies another is to end."""


def start(progress_queue: Any, alone_event: Any, threads: int) -> None:
    """Makes a process ready: it keeps to its threads, and leaves Ctrl-C to the process that started it."""
    quieten_libraries()

    import torch

    global progress, alone
    progress, alone = progress_queue, alone_event
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
