"""Objectives by name: what the loop knows of them, what they say of themselves, and which are refused."""

import ast
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dgpo_fast.config.options import Config, Data, Distributed, Policy, Rollout
from dgpo_fast.engine.batches import batch_sizes
from dgpo_fast.errors import UserError
from dgpo_fast.memory.predict import Predictor
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.dgpo import DGPOObjective
from dgpo_fast.objectives.diffusion_dpo import DiffusionDPOObjective
from dgpo_fast.objectives.protocol import Objective, Traits
from dgpo_fast.objectives.registry import BUILT_IN, load_objective, traits
from tests.objective_case import make_config
from tests.sd3 import family_in

PACKAGE = Path(__file__).parents[1] / "dgpo_fast"


ROOMS_WITHOUT_NAMES = ("engine", "learning", "memory", "rollout", "run")


def test_the_loop_knows_no_objective() -> None:
    """Neither the loop nor the command, the engine or the prediction of memory names an objective, or reads one's
    settings."""
    names = {*BUILT_IN, *(cls.__name__ for cls in (DGPOObjective, DiffusionDPOObjective)), "FlowGRPOObjective"}
    for file in (
        "train.py",
        "build.py",
        "lifecycle.py",
        "trainer.py",
        *(f"{room}/{path.name}" for room in ROOMS_WITHOUT_NAMES for path in (PACKAGE / room).glob("*.py")),
    ):
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
        assert not used & names, (file, used & names)


class Outside(Objective):
    """An objective of a user's that says nothing of itself."""

    def __init__(self, config: Config):
        self.micro_batch = config.policy.micro_batch_size  # refuses "auto", which is still to be chosen

    def accumulate(self, batch: Batch, models: object, old: object) -> dict:
        return {}


class OutsideDeclares(Outside):
    """The same, with guidance in all its forwards, at three levels at once, and on sharded weights."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return Traits(levels_at_once=3, guided_base=True, guided_policy=True, shardable=True)


made_by_a_function = lambda config: OutsideDeclares(config)  # noqa: E731


with_an_argument = partial(OutsideDeclares)


def test_an_objective_from_outside_is_treated_as_it_declares(random_pipeline: Path) -> None:
    """What is padded, predicted and refused goes by what the objective says, and by the defaults where it is silent."""
    config = replace(make_config(), policy=Policy(micro_batch="auto"), rollout=Rollout(group_size=2, groups=5))
    silent, says = (replace(config, objective=f"{__name__}:{name}") for name in ("Outside", "OutsideDeclares"))
    assert traits(silent) == Traits()
    assert traits(says) == traits(replace(says, objective=f"{__name__}:with_an_argument"))
    assert traits(says) == Traits(levels_at_once=3, guided_base=True, guided_policy=True, shardable=True)
    chosen = replace(config.policy, micro_batch=4)
    frozen = [batch_sizes(replace(of, policy=chosen), processes=1).frozen for of in (silent, says)]
    assert frozen == [10, 30]
    predictor = Predictor(family_in(random_pipeline), torch.float32)
    latent = 4 * 16 * 8 * 8
    # Noisy latents of three levels and not of one; velocities, of three models, of 10 samples and 30, and not of 10.
    assert predictor.inputs(says) - predictor.inputs(silent) == latent * (10 * 2 + 3 * 20)
    forwards = [predictor.predict(of, 4).phases["reference forwards"] - predictor.inputs(of) for of in (silent, says)]
    assert forwards[1] > 1.5 * forwards[0], "a guided forward has two rows a sample"
    sharded = {"policy": chosen, "distributed": Distributed(shard="full")}
    load_objective(replace(says, **sharded))
    with pytest.raises(UserError) as caught:
        load_objective(replace(silent, **sharded))
    assert str(caught.value) == (
        f"distributed.shard full: objective '{__name__}:Outside' does not declare that it runs with sharded weights; "
        "see `shardable` in docs/objectives.md"
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"objective": "ppo"}, f"no objective 'ppo': name one of {', '.join(BUILT_IN)}, or your own as "),
        ({"objective": "nowhere:Mine"}, "objective 'nowhere:Mine': no module 'nowhere' in the working folder or among"),
        (
            {"objective": "dgpo_fast.config.options:DGPO"},
            "objective 'dgpo_fast.config.options:DGPO' cannot be made: ValidationError: ",
        ),
        (
            {"objective": "dgpo_fast.config.reading:flat"},
            "objective 'dgpo_fast.config.reading:flat' is no dgpo_fast.objectives.Objective",
        ),
        (
            {"objective": f"{__name__}:made_by_a_function"},
            f"objective '{__name__}:made_by_a_function': its traits are asked before it is made: name the class, or",
        ),
        ({"objective": "flow_grpo"}, "objective 'flow_grpo' learns from the noise of the rollout's steps and rollout."),
        (
            {"objective": "flow_grpo", "rollout": Rollout(solver="euler", noise_level=0.7)},
            "objective 'flow_grpo' learns from the steps of its own policy and ema.switch_ema_ref 500 lets ",
        ),
        (
            {"objective": "flow_grpo", "data": Data(source="offline")},
            "data.source offline: objective 'flow_grpo' learns from the steps of its own rollouts",
        ),
    ],
)
def test_an_objective_that_cannot_be_is_refused_in_one_line(change: dict, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_objective(replace(Config(), **change))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
