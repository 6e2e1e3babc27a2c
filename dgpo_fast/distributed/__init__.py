"""One run on any number of processes, under torchrun's environment; a run of one process needs none of it.

* `processes.py`: the process group, and everything that processes tell one another;
* `placement.py`: which samples of an iteration belong to which process;
* `gradients.py`: the sum of gradients over processes.
"""

from dgpo_fast.distributed.placement import Share, place
from dgpo_fast.distributed.processes import ALONE, LostError, Processes, SharedError, connect

__all__ = ["ALONE", "LostError", "Processes", "Share", "SharedError", "connect", "place"]
