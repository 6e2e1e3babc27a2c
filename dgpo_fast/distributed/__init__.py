"""A run on any number of processes, started by torchrun. A run of one process needs none of it.

* `processes.py`: the process group, and all communication between processes;
* `placement.py`: which samples of an iteration belong to which process;
* `batch_part.py`: what a process must know about the others' samples to train on its own;
* `gradients.py`: the sum of gradients over processes.
"""

from dgpo_fast.distributed.batch_part import BatchPart
from dgpo_fast.distributed.placement import Share, place
from dgpo_fast.distributed.processes import ALONE, LostError, Processes, SharedError, connect

__all__ = ["ALONE", "BatchPart", "LostError", "Processes", "Share", "SharedError", "connect", "place"]
