"""Samples at a noise level in float64, and settings of runs, for tests of objectives that regress velocities."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dgpo_fast.config.objective_options import AWM, CRD, NFT, RAM
from dgpo_fast.config.options import Config
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.denoising import Noised
from dgpo_fast.objectives.drift import mean_square
from dgpo_fast.objectives.levels import Inputs
from dgpo_fast.rollout.schedule import make_schedule
from tests.objective_case import make_config

SHAPE = (2, 3, 3)
SIGMA = (0.9, 0.7, 0.6, 0.35, 0.8, 0.2)


def config_of(objective: str, **settings: object) -> Config:
    """A run of `objective` that may start; three noise levels unless `settings` say otherwise."""
    base = make_config()
    kinds = {"nft": NFT, "awm": AWM, "ram": RAM, "crd": CRD}
    given = {"timesteps": 3, **settings}
    old_draws = objective == "nft" or (objective == "ram" and given.get("residual") != "policy")
    ema = replace(base.ema, switch_ema_ref=0 if old_draws or given.get("clip_range") is not None else None)
    return replace(base, objective=objective, ema=ema, **{objective: kinds[objective](**given)})


def make_noised(advantage: Tensor, *, group_size: int = 3, at_old: bool = False) -> tuple[Tensor, Noised]:
    """A policy's velocity, and samples with `advantage` (B,) that differ in σ; `at_old`: the policy is θ_old."""
    generator, count = torch.manual_seed(5), len(advantage)

    def random() -> Tensor:
        return torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)

    number, sigma = torch.arange(count), torch.tensor(SIGMA[:count], dtype=torch.float64)
    x0, text = random(), TextEmbeds.of_samples({"prompt": torch.zeros(count, 1, 1)})
    batch = Batch(
        iteration=0,
        x0=x0,
        text=text,
        advantage=advantage.double(),
        group_index=number // group_size,
        sample_index=number,
        group_size=group_size,
        schedule=make_schedule("euler", 6, 3.0),
    )
    old_v = random()
    noised = Noised(
        batch=batch,
        inputs=Inputs(x0, 1000 * sigma, text),
        sigma=sigma,
        weight=torch.ones(count),
        key=number,
        seed=torch.tensor(3),
        draw=torch.tensor(8),
        predicted={"old_v": old_v, "ref_v": random()},
    )
    policy_v = old_v.clone() if at_old else old_v + 0.3 * random()
    return policy_v.requires_grad_(), noised


def gradient(losses: Callable[[Tensor], Tensor], policy_v: Tensor) -> Tensor:
    """∂ (sum of `losses`) / ∂ policy_v."""
    return torch.autograd.grad(losses(policy_v).sum(), policy_v)[0]


def error_gradient(policy_v: Tensor, noised: Noised) -> Tensor:
    """∇d of each sample, d = mean (v − v*)²."""
    return gradient(lambda v: mean_square(v - noised.target_v), policy_v)


def per_sample(values: Tensor) -> Tensor:
    """(B,) against (B, C, H, W)."""
    return values.reshape(-1, 1, 1, 1)


def assert_is_derivative(losses: Callable[[Tensor], Tensor], policy_v: Tensor) -> None:
    """The gradient is that of central differences, in three directions."""
    found, step = gradient(losses, policy_v), 1e-5
    generator = torch.manual_seed(6)
    for _ in range(3):
        direction = torch.randn(policy_v.shape, generator=generator, dtype=torch.float64)
        ends = [losses(policy_v.detach() + sign * step * direction).sum() for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((found * direction).sum()) == float(expected) or abs(
            float((found * direction).sum() - expected)
        ) < 1e-6 * abs(float(expected))


class Held:
    """Stands for a function whose values a loss takes as constants: each call returns what the same call of the first
    pass returned. `passes` says how many calls a pass has."""

    def __init__(self, function: Callable[..., Tensor], calls: int):
        self.function, self.calls, self.values, self.number = function, calls, list[Tensor](), 0

    def __call__(self, *args: object) -> Tensor:
        if len(self.values) < self.calls:
            self.values.append(self.function(*args).detach())
        self.number += 1
        return self.values[(self.number - 1) % self.calls]
