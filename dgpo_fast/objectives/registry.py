"""Objectives by name or import path."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.objectives.protocol import Objective, Traits
from dgpo_fast.user_code import call, import_attribute

BUILT_IN = {
    "dgpo": "dgpo_fast.objectives.dgpo:DGPOObjective",
    "diffusion_dpo": "dgpo_fast.objectives.diffusion_dpo:DiffusionDPOObjective",
    "flow_grpo": "dgpo_fast.objectives.flow_grpo:FlowGRPOObjective",
    "nft": "dgpo_fast.objectives.nft:NFTObjective",
    "awm": "dgpo_fast.objectives.awm:AWMObjective",
    "ram": "dgpo_fast.objectives.ram:RAMObjective",
    "crd": "dgpo_fast.objectives.crd:CRDObjective",
    "kto": "dgpo_fast.objectives.kto:KTOObjective",
}


def traits(config: Config) -> Traits:
    """What the objective that `config` names needs, by its class's `traits`; nothing is made.

    Raises UserError in one line if there is no such objective.
    """
    make, what = _find(config.objective)
    owner = make.func if isinstance(make, partial) else make  # `partial(MyObjective, temperature=0.5)`
    told = call(what, "cannot say its traits", getattr(owner, "traits", Objective.traits), config)
    if not isinstance(told, Traits):
        raise UserError(f"{what}: its `traits` must return a Traits: docs/objectives.md shows one")
    return told


def load_objective(config: Config) -> Objective:
    """The objective that `config` names, a shipped one or `my_module:MyObjective`, called with `config`.

    Raises UserError in one line if there is none, or if it cannot work with these settings.
    """
    make, what = _find(config.objective)
    objective = call(what, "cannot be made", make, config)
    if not isinstance(objective, Objective):
        raise UserError(f"{what} is no dgpo_fast.objectives.Objective: docs/objectives.md shows how to derive one")
    needs = traits(config)
    if type(objective).traits(config) != needs:
        raise UserError(f"{what}: its traits are asked before it is made: name the class, or functools.partial of it")
    if config.distributed.shard != "none" and not needs.shardable:
        raise UserError(
            f"distributed.shard {config.distributed.shard}: {what} does not declare that it runs with sharded weights; "
            "see `shardable` in docs/objectives.md"
        )
    if config.regulariser.norm_hinge > 0 and not needs.norm_hinge:
        raise UserError(
            f"regulariser.norm_hinge {config.regulariser.norm_hinge:g}: {what} does not declare that it adds it to its "
            "loss; see `norm_hinge` in docs/objectives.md"
        )
    if needs.needs_transitions:
        _require_steps(config, what)
    if config.data.source == "online":
        _require_sampler(config, needs, what)
    return objective


def check_kl_term(config: Config, weights: Mapping[str, float]) -> None:
    """Raises UserError, one line, if the KL term cannot be what `regulariser` asks for.

    Args:
        config: the run's.
        weights: of its rewards, by name.
    """
    regulariser = config.regulariser
    gate = ", ".join(regulariser.kl_gate)
    given = f"kl_growth {regulariser.kl_growth:g}" if regulariser.kl_growth else f"kl_gate {gate}" if gate else None
    if given is not None and not traits(config).kl_term:
        raise UserError(
            f"regulariser.{given}: objective {config.objective!r} has no KL term with a weight above 0: raise its "
            "kl_weight if it has one, or leave this out; see `kl_term` in docs/objectives.md"
        )
    if gate and config.data.source == "preferences":
        raise UserError(
            f"regulariser.kl_gate {gate}: data.source is preferences, and rewards do not score them: leave it out"
        )
    for name in regulariser.kl_gate:
        if name not in weights:
            raise UserError(
                f"regulariser.kl_gate {name}: no such reward in this run, which has {', '.join(weights)}: add it, with "
                f"the weight 0 if it should not be trained on, as in --rewards {' '.join(config.rewards)} {name}=0"
            )
    if gate and not any(weight for name, weight in weights.items() if name not in regulariser.kl_gate):
        raise UserError(
            f"regulariser.kl_gate {gate}: nothing else is trained on, and a reward always agrees with itself: name "
            "another reward in --rewards too"
        )


def _require_steps(config: Config, what: str) -> None:
    """Raises UserError if there are no steps of a rollout to learn from."""
    if config.data.source != "online":
        raise UserError(
            f"data.source {config.data.source}: {what} learns from the steps of its own rollouts; use --data.source "
            "online"
        )
    if config.rollout.noise_level == 0:
        raise UserError(
            f"{what} learns from the noise of the rollout's steps and rollout.noise_level is 0: give it some, "
            "as in --rollout.solver euler --rollout.noise-level 0.7"
        )


def _require_sampler(config: Config, needs: Traits, what: str) -> None:
    """Raises UserError if other weights draw the rollouts than those that the objective must learn from."""
    ema, parts = config.ema, "steps" if needs.needs_transitions else "images"
    if needs.drawn_by == "any":
        return
    whose = "its own policy" if needs.drawn_by == "policy" else "θ_old"
    if ema.rollout_decay_per_step is not None:
        raise UserError(
            f"{what} learns from the {parts} of {whose} and ema.rollout_decay_per_step {ema.rollout_decay_per_step:g} "
            "lets another average draw them: use --ema.rollout-decay-per-step none"
        )
    if needs.drawn_by == "policy" and ema.switch_ema_ref is not None:
        raise UserError(
            f"{what} learns from the {parts} of its own policy and ema.switch_ema_ref {ema.switch_ema_ref} lets "
            "its average draw them later: use --ema.switch-ema-ref none"
        )
    if needs.drawn_by == "old" and ema.switch_ema_ref != 0:
        given = "none" if ema.switch_ema_ref is None else ema.switch_ema_ref
        raise UserError(
            f"{what} learns from the {parts} of θ_old and ema.switch_ema_ref {given} lets the policy draw them: "
            "use --ema.switch-ema-ref 0"
        )


def _find(name: str) -> tuple[Any, str]:
    """What makes the objective `name`, a class or a user's function, and how errors name it."""
    if ":" not in name and name not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise UserError(f"no objective {name!r}: name one of {known}, or your own as my_module:MyObjective")
    what = f"objective {name!r}"
    return import_attribute(what, BUILT_IN.get(name, name), example="my_objective:MyObjective"), what
