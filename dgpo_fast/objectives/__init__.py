"""What the groups are used for: one protocol, one file an objective.

The training loop knows only `Objective`. It draws what the objective needs and hands over an iteration's scored images,
the objective adds the gradient of its loss to the policy's parameters, and the loop takes the optimizer's steps.
"""

from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.protocol import Objective, Traits
from dgpo_fast.objectives.registry import load_objective

__all__ = ["Batch", "Objective", "Traits", "add_metrics", "load_objective"]
