"""Settings and cases that tests of several objectives share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_fast.config.objective_options import FlowGRPO
from dgpo_fast.config.options import Config
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import sample_latents
from dgpo_fast.rollout.schedule import make_schedule
from dgpo_fast.rollout.step_noise import StepNoise, Transitions
from tests.objective_case import GROUPS, SIZE, Case, make_config


def grpo_config(**flow_grpo: object) -> Config:
    config = make_config()
    rollout = replace(config.rollout, solver="euler", noise_level=0.7, guidance_scale=2.0)
    ema = replace(config.ema, switch_ema_ref=None)
    return replace(config, objective="flow_grpo", rollout=rollout, ema=ema, flow_grpo=FlowGRPO(**flow_grpo))


def grpo_case(folder: Path, **flow_grpo: object) -> Case:
    """Groups drawn with noise by θ_old, and a policy that has moved away from it."""
    config = grpo_config(**flow_grpo)
    case = Case(folder, config)
    rollout = config.rollout
    schedule = make_schedule("euler", rollout.num_inference_steps, 3.0, rollout.noise_level)
    case.models.load_behaviour(case.old)
    step_noise = StepNoise(torch.arange(GROUPS * SIZE), seed=5, draw=7, keep=True)
    x0 = sample_latents(
        case.models.behaviour,
        case.batch.x0,
        case.batch.text,
        Draw(schedule, Guidance(rollout.guidance_scale), batch_size=GROUPS * SIZE),
        step_noise=step_noise,
    )
    case.batch = replace(case.batch, x0=x0, schedule=schedule, transitions=step_noise.transitions)
    return case


def make_batch(advantage: np.ndarray) -> Batch:
    """Groups with these advantages (P, G) and latents that are their own numbers."""
    groups, size = advantage.shape
    count = groups * size
    number = torch.arange(count, dtype=torch.float32)
    return Batch(
        iteration=0,
        x0=number.reshape(-1, 1, 1, 1),
        text=TextEmbeds.of_samples({"prompt": number.reshape(-1, 1, 1), "pooled": number.reshape(-1, 1)}),
        advantage=torch.from_numpy(advantage).flatten(),
        group_index=torch.arange(groups).repeat_interleave(size),
        sample_index=torch.arange(count),
        group_size=size,
        schedule=make_schedule("euler", 2, 3.0, 0.7),
        transitions=Transitions(number.reshape(1, -1), number[None]),
    )


def watched(case: Case, micro_batch: int = 12) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[int]]]:
    """Gradient, metrics, and the rows of each forward of the base, and of the policy with and without a gradient."""
    rows: dict[str, list[int]] = {"base": [], "policy": [], "constant": []}

    def on_policy(_: object, __: tuple, kwargs: dict) -> None:
        rows["policy" if torch.is_grad_enabled() else "constant"].append(len(kwargs["hidden_states"]))

    hooks = [
        case.models.base.register_forward_pre_hook(
            lambda _, __, kwargs: rows["base"].append(len(kwargs["hidden_states"])), with_kwargs=True
        ),
        case.models.policy.register_forward_pre_hook(on_policy, with_kwargs=True),
    ]
    gradient, metrics = case.gradient(micro_batch)
    for hook in hooks:
        hook.remove()
    return gradient, metrics, rows


def assert_same(found: tuple, expected: tuple) -> None:
    """Gradient and metrics, within the rounding of fp32 on any processor."""
    assert expected[0].abs().max() > 0
    assert (found[0] - expected[0]).abs().max() < 1e-4 * expected[0].abs().max()
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
