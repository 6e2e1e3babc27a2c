"""Objectives by name or import path."""

from dataclasses import dataclass, fields, replace
from typing import Any, cast

from dgpo_fast.config import Config
from dgpo_fast.errors import UserError
from dgpo_fast.objectives.protocol import Objective
from dgpo_fast.user_code import call, import_attribute

BUILT_IN = {
    "dgpo": "dgpo_fast.objectives.dgpo:DGPOObjective",
    "diffusion_dpo": "dgpo_fast.objectives.diffusion_dpo:DiffusionDPOObjective",
    "flow_grpo": "dgpo_fast.objectives.flow_grpo:FlowGRPOObjective",
}


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
    make = import_attribute(what, BUILT_IN.get(name, name), example="my_objective:MyObjective")
    objective = call(what, "cannot be made", make, config)
    parts = ("needs_transitions", "optimizer_batches", "accumulate")
    missing = [part for part in parts if not hasattr(objective, part)]
    if missing:
        raise UserError(f"{what} has no `{missing[0]}`: docs/objectives.md shows what an objective has")
    return cast(Objective, objective)
