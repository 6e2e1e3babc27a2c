"""Direct Group Preference Optimization (DGPO) for text-to-image diffusion models.

Nothing heavy is imported here: `python -m dgpo_fast.train` is the way in.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

LOAD = Path("/proc/loadavg")


def spin_count(load: str, free: int) -> str:
    """How often OpenMP's threads look for one another before they sleep.

    If all cores are theirs, waking a thread costs more than a longer spin. If another program has the core of one of
    them, the others spin in vain and keep it from finishing. Measured by `python -m benchmarks.shared_cpu`.

    Args:
        load: the content of /proc/loadavg.
        free: cores that this process may not use, on which others run without disturbing it.
    """
    last_minute, _, _, processes, _ = load.split()
    running = int(processes.split("/")[0]) - 1  # without this one
    # One that woke up just now is no load, and neither is one that has ended.
    return "1000" if min(running, float(last_minute)) > free + 0.5 else "3000"


# The OpenMP library reads this when torch loads it, and worker processes inherit it.
if LOAD.exists() and os.environ.keys().isdisjoint({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}):
    _free = (os.cpu_count() or 1) - len(os.sched_getaffinity(0))
    os.environ["GOMP_SPINCOUNT"] = spin_count(LOAD.read_text("utf-8"), _free)
