"""Where the time of an iteration goes on several processes."""

from dgpo_fast.distributed.processes import Processes
from dgpo_fast.records import Metrics


def shared_seconds(mine: Metrics, iteration_s: float, processes: Processes, what: str) -> Metrics:
    """`mine`, this process's seconds per phase; of several processes with waiting time and imbalance of all of them.

    Args:
        mine: seconds by phase.
        iteration_s: of the whole iteration.
        processes: all of them call this together.
        what: named in the error if the others do not come.
    """
    if processes.count == 1:
        return mine
    everyone = processes.gather({**mine, "waited_s": processes.take_waited_s()}, what)
    busy = [max(iteration_s - theirs["waited_s"], 0.0) for theirs in everyone]
    waited_s = sum(theirs["waited_s"] for theirs in everyone) / len(everyone)
    # 1 is even: the slowest process works as long as the mean.
    imbalance = max(busy) * len(busy) / sum(busy) if any(busy) else 1.0
    return {**mine, "waited_s": waited_s, "imbalance": imbalance, "processes": everyone}
