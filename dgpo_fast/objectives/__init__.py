"""What the groups are used for: one protocol, one file an objective.

The training loop knows only `Objective`. It draws what the objective needs and hands over an iteration's scored images,
the objective adds the gradient of its loss to the policy's parameters, and the loop takes the optimizer's steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.distributed import BatchPart
from dgpo_fast.errors import UserError
from dgpo_fast.user_code import call, import_attribute
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.rollout.step_noise import Transitions
from dgpo_fast.models.prompt_encoder import TextEmbeds

BUILT_IN = {
    "dgpo": "dgpo_fast.objectives.dgpo:DGPOObjective",
    "diffusion_dpo": "dgpo_fast.objectives.diffusion_dpo:DiffusionDPOObjective",
    "flow_grpo": "dgpo_fast.objectives.flow_grpo:FlowGRPOObjective",
}


@dataclass(frozen=True)
class Batch:
    """One iteration's images, whole groups one after another.

    Attributes:
        iteration: counted from 0; keys every draw.
        x0: (B, C, H, W) fp32 final latents.
        text: the B prompts.
        empty: the empty prompt, one row.
        advantage: (B,) fp32.
        group_index: (B,) int64; equal within a group and different between the groups of an iteration. Keys the noise.
        group_size: G, samples per group.
        schedule: the rollout's grid.
        transitions: every step of the rollout, for an objective that `needs_transitions`.
        part: where these samples stand among those of all processes; None where they are all.
    """

    iteration: int
    x0: Tensor
    text: TextEmbeds
    empty: TextEmbeds
    advantage: Tensor
    group_index: Tensor
    group_size: int
    schedule: Schedule
    transitions: Transitions | None = None
    part: BatchPart | None = None

    @property
    def groups(self) -> int:
        """P, the groups in this batch, those of other processes among them."""
        return len(self.x0) // self.group_size if self.part is None else self.part.groups

    @property
    def samples(self) -> int:
        """P·G, the samples that the loss is a mean over, those of other processes among them."""
        return self.groups * self.group_size

    @property
    def most(self) -> int:
        """Forwards must be as many as for so many samples: see `BatchPart.most`."""
        return 0 if self.part is None else self.part.most

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """The same for some of the samples; the caller sees to it that groups stay whole, or gives a `group_size`."""
        return replace(
            self,
            x0=self.x0[rows],
            text=self.text[rows],
            advantage=self.advantage[rows],
            group_index=self.group_index[rows],
            transitions=None if self.transitions is None else self.transitions[rows],
        )

    def split(self, parts: int) -> list["Batch"]:
        """Up to `parts` batches of whole groups, as even as they can be; none is empty on all processes together."""
        ends = [self.groups * part // parts * self.group_size for part in range(parts + 1)]
        return [self._between(start, end) for start, end in pairwise(ends) if end > start]

    def _between(self, start: int, end: int) -> "Batch":
        if self.part is None:
            return self[start:end]
        return replace(self[self.part.rows(start, end, len(self.x0))], part=self.part.only(start, end))


class Objective(Protocol):
    """A way to turn scored groups into gradients. Made from the run's `Config` alone, and more than once.

    Attributes with a value may be left out by a class that is not derived from this one: that value is then meant.
    """

    needs_transitions: bool
    """Whether it needs every step of a rollout with noise (`Batch.transitions`), and not only the final latents."""
    levels_at_once: int = 1
    """Noise levels of an iteration's samples that frozen weights predict together (`levels.predict_levels`)."""
    guided_base: bool = False
    """Whether the base predicts pairs for guidance, and nothing else."""
    guided_policy: bool = False
    """Whether the policy does."""
    shardable: bool = False
    """Whether it runs on sharded weights, where all processes must make equally many forwards (`Batch.most`)."""

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """How an iteration's batch splits into optimizer steps: one step for each of these, in this order."""
        ...

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """Adds ∂loss/∂θ to the `.grad` of `models.weights` and returns 0-dim device tensors to log.

        The loss is a mean over `batch.samples`. With several processes, gradients and returned values are parts of
        that mean, which the loop adds up; a process may hold no sample of a batch.

        Args:
            batch: what was sampled and how it scored: one of `optimizer_batches`.
            models: base, policy and behaviour; the behaviour copy may be overwritten.
            old: θ_old.
        """
        ...


@dataclass(frozen=True)
class Declared:
    """What an objective says of itself; what it leaves out has the default that `Objective` gives it."""

    needs_transitions: bool
    levels_at_once: int
    guided_base: bool
    guided_policy: bool
    shardable: bool


def load_objective(config: Config) -> Objective:
    """The objective that `config` names, a shipped one or `my_module:MyObjective`, called with `config`.

    Raises UserError in one line where there is none, or where it cannot work with these settings.
    """
    objective, what = _make(config), f"objective {config.objective!r}"
    if config.distributed.shard != "none" and not _declared(objective).shardable:
        raise UserError(
            f"distributed.shard {config.distributed.shard}: {what} does not say that it runs on sharded weights; "
            "docs/objectives.md has what it takes (`shardable`)"
        )
    if objective.needs_transitions and config.data.source == "offline":
        raise UserError(
            f"data.source offline: {what} learns from the steps of its own rollouts; use --data.source online"
        )
    if objective.needs_transitions and config.rollout.noise_level == 0:
        raise UserError(
            f"{what} learns from the noise of the rollout's steps and rollout.noise_level is 0: give it some, "
            "as in --rollout.solver euler --rollout.noise-level 0.7"
        )
    if objective.needs_transitions and config.ema.switch_ema_ref is not None:
        raise UserError(
            f"{what} learns from the steps of its own policy and ema.switch_ema_ref {config.ema.switch_ema_ref} lets "
            "its average draw them later: use --ema.switch-ema-ref none"
        )
    return objective


def declared(config: Config) -> Declared:
    """What the objective that `config` names says of itself; the micro-batch may still be "auto".

    Raises UserError in one line where there is no such objective.
    """
    policy = replace(config.policy, micro_batch=1) if config.policy.micro_batch == "auto" else config.policy
    return _declared(_make(replace(config, policy=policy)))


def _declared(objective: Objective) -> Declared:
    says: dict[str, Any] = {}
    for name in (field.name for field in fields(Declared)):
        says[name] = getattr(objective if hasattr(objective, name) else Objective, name)
    return Declared(**says)


def _make(config: Config) -> Objective:
    name = config.objective
    if ":" not in name and name not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise UserError(f"no objective {name!r}: name one of {known}, or your own as my_module:MyObjective")
    what = f"objective {name!r}"
    make = import_attribute(what, BUILT_IN.get(name, name), example="my_objectives:MyObjective")
    objective = call(what, "cannot be made", make, config)
    parts = ("needs_transitions", "optimizer_batches", "accumulate")
    missing = [part for part in parts if not hasattr(objective, part)]
    if missing:
        raise UserError(f"{what} has no `{missing[0]}`: docs/objectives.md shows what an objective has")
    return cast(Objective, objective)


def add_metrics(totals: dict[str, Any], values: dict[str, Tensor], weight: float) -> None:
    """Adds `weight` times each of `values` to `totals`, without a host sync."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + weight * value.detach()


def autocast(models: PolicyModels) -> torch.autocast:
    """bf16 arithmetic for the policy's forward where the run is in bf16 and trained weights are fp32."""
    return torch.autocast(models.device.type, dtype=torch.bfloat16, enabled=models.mixed)
