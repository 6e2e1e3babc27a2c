"""The DGPO objective and the three sets of weights, on an untrained pipeline of SD3.5's architecture."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dgpo_kernels import group_noise
from torch.utils._python_dispatch import TorchDispatchMode

from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.config.options import Engine, Policy
from dgpo_fast.errors import UserError
from dgpo_fast.learning.ema import MovingAverage
from dgpo_fast.models.forward import predict
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.objectives.advantages import advantages
from dgpo_fast.objectives.levels import draw_training_steps
from dgpo_fast.objectives.noise_levels import NoiseLevels
from dgpo_fast.seeds import stream_seed
from tests.objective_case import CPU, GROUPS, SIZE, Case, make_config


def levels_of(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(timestep, σ) of each level, () each, or (B,) and (B, 1, 1, 1)."""
    config, batch = case.config.dgpo, case.batch
    if config.lowest_sigma is not None:
        levels = NoiseLevels("uniform", config.timesteps, case.config.seed, lowest=config.lowest_sigma)
        drawn = levels.draw(batch.iteration, batch.schedule, batch.group_index)
        assert all(len(level.sigma.unique()) == GROUPS for level in drawn), "equal within a group"
        return [(level.timestep, level.sigma.reshape(-1, 1, 1, 1)) for level in drawn]
    steps = draw_training_steps(batch.iteration, count=config.timesteps, among=4, seed=case.config.seed)
    timesteps, sigmas = batch.schedule.timesteps, batch.schedule.sigmas
    return [(timesteps[s], timesteps[s] / 1000 if config.training_sigma == "timestep" else sigmas[s]) for s in steps]


def written_out(case: Case) -> torch.Tensor:
    """The loss as the paper has it, over whole groups, in plain tensor arithmetic."""
    config, batch, models = case.config.dgpo, case.batch, case.models
    models.load_behaviour(case.old)
    seed = stream_seed(case.config.seed, "training noise")
    losses = []
    for slot, (timestep, sigma) in enumerate(levels_of(case)):
        draw = batch.iteration * config.timesteps + slot
        noise = group_noise(torch.zeros_like(batch.x0), torch.tensor(1.0), batch.group_index, seed=seed, draw=draw)
        assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[SIZE])
        x_t, target = (1 - sigma) * batch.x0 + sigma * noise, noise - batch.x0
        with torch.no_grad():
            conditional = predict(models.base, x_t, timestep, batch.text)
            old = predict(models.behaviour, x_t, timestep, batch.text)
            negative = predict(models.base, x_t, timestep, batch.text.negative())
            kl_v = negative + config.kl_guidance_scale * (conditional - negative)
        ref = old if config.reference == "ema" else kl_v if config.guided_reference else conditional
        policy = predict(models.policy, x_t, timestep, batch.text)
        d, d_ref, d_old = ((v - target).square().mean((1, 2, 3)) for v in (policy, ref, old))
        if config.clip_range is not None:
            ratio, better = torch.exp(d_old - d.detach()), batch.advantage > 0
            clipped = torch.where(better, ratio > 1 + config.clip_range, ratio < 1 - config.clip_range)
            assert 0 < clipped.sum() < len(clipped), "the case must clip some samples and not others"
            d = torch.where(clipped, d.detach(), d)
        score = config.beta / SIZE * (batch.advantage * (d - d_ref)).reshape(GROUPS, SIZE).sum(1)
        kl = (policy - kl_v).square().mean((1, 2, 3))
        kl = kl + case.config.regulariser.kl_growth * kl.square() / 2
        kl = (kl if batch.kl_gate is None else batch.kl_gate * kl).mean()
        losses.append(torch.nn.functional.softplus(score).mean() / config.beta + config.kl_weight * kl)
    return torch.stack(losses).mean()


VARIANTS = {
    "released": {},
    "no clip": {"clip_range": None},
    "no KL": {"kl_weight": 0.0},
    "guided KL reference": {"kl_guidance_scale": 4.5},
    "guided reference": {"kl_guidance_scale": 4.5, "guided_reference": True, "training_sigma": "timestep"},
    "guided reference, no KL": {"kl_guidance_scale": 4.5, "guided_reference": True, "kl_weight": 0.0},
    "EMA reference": {"reference": "ema", "beta": 2000.0},
    "nothing but groups": {"clip_range": None, "kl_weight": 0.0},
    "off the grid": {"clip_range": None, "lowest_sigma": 0.0, "timesteps": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_that_of_the_loss_written_out(variant: str, random_pipeline: Path) -> None:
    case = Case(random_pipeline, make_config(**VARIANTS[variant]))
    loss = written_out(case)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch=GROUPS * SIZE)
    # In fp32: guidance multiplies the rounding of a difference of two predictions.
    assert torch.linalg.norm(found - expected) < 5e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("micro_batch", [3, 2 * SIZE + 1, GROUPS * SIZE])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_kl_term_that_grows_and_is_gated_is_that_of_the_loss_written_out(
    micro_batch: int, guidance: float, random_pipeline: Path
) -> None:
    case = Case(random_pipeline, make_config(kl_guidance_scale=guidance, kl_weight=3.0))
    case.config.regulariser.kl_growth = 50.0
    case.batch = replace(case.batch, kl_gate=torch.linspace(0, 1, GROUPS * SIZE))
    loss = written_out(case)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch)
    assert torch.linalg.norm(found - expected) < 5e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5) and metrics["kl"] > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("micro_batch", [1, 3, SIZE, 2 * SIZE + 1])
def test_micro_batches_do_not_change_the_gradient(variant: str, micro_batch: int, random_pipeline: Path) -> None:
    """One sample at a time, parts of groups, whole groups: the same gradient and metrics to 1e-5."""
    case = Case(random_pipeline, make_config(**VARIANTS[variant]))
    whole, whole_metrics = case.gradient(micro_batch=GROUPS * SIZE)
    parts, parts_metrics = case.gradient(micro_batch=micro_batch)
    assert (parts - whole).abs().max() < 1e-5 * whole.abs().max()
    for name, value in whole_metrics.items():
        assert parts_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_equal_rewards_leave_only_the_kl_term(random_pipeline: Path) -> None:
    """Groups of equal rewards have no gradient without a KL term, and the KL term's own gradient with one."""
    equal = advantages(np.full((GROUPS, SIZE), 0.3, np.float32), Advantage())
    gradients = []
    for kl_weight, beta in ((0.0, 100.0), (0.02, 100.0), (0.02, 1.0)):
        case = Case(random_pipeline, make_config(kl_weight=kl_weight, beta=beta, clip_range=None))
        case.batch = replace(case.batch, advantage=equal)
        gradients.append(case.gradient(micro_batch=12)[0])
    assert gradients[0].abs().max() == 0 < gradients[1].abs().max()
    assert torch.equal(gradients[1], gradients[2]), "the groups' strength plays no part"


@pytest.mark.parametrize("what", [("lora", "merged"), ("lora", "adapter"), ("full", "merged")])
def test_behaviour_predicts_what_the_policy_does(what: tuple[str, str], random_pipeline: Path) -> None:
    """The copy agrees with the policy; base stays the pretrained model; both are where no gradient reaches."""
    config = replace(make_config(), policy=replace(make_config().policy, train=what[0], behaviour=what[1]))
    case = Case(random_pipeline, config)
    original = load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32).transformer
    x_t, timestep, text = case.batch.x0, torch.tensor(700.0), case.batch.text
    with torch.no_grad():
        base = predict(original, x_t, timestep, text)
        policy = predict(case.models.policy, x_t, timestep, text)
        case.models.load_behaviour(case.models.weights)
        merged = predict(case.models.behaviour, x_t, timestep, text)
        assert (policy - base).abs().max() > 1e-2
        assert torch.allclose(merged, policy, atol=0 if what == ("lora", "adapter") else 2e-5)
        assert torch.equal(predict(case.models.base, x_t, timestep, text), base)
        case.models.load_behaviour(case.models.initial_weights())
        assert torch.equal(predict(case.models.behaviour, x_t, timestep, text), base)
    assert not any(p.requires_grad for m in (case.models.base, case.models.behaviour) for p in m.parameters())


def test_seed_and_draw_are_made_once_a_level(random_pipeline: Path) -> None:
    """Not once for each micro-batch and operator: on a GPU each of them is a launch."""

    class Numbers(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            fills = func in (torch.ops.aten.full.default, torch.ops.aten.fill_.Scalar)
            self.made += fills and found.dtype == torch.int64 and found.dim() == 0
            return found

    case = Case(random_pipeline, make_config(timesteps=3))
    with Numbers() as numbers:
        case.gradient(micro_batch=1)
    assert numbers.made == 1 + 3, "a seed, and a draw for each level"


def test_lora_policy_shares_the_base_weights(random_pipeline: Path) -> None:
    """A LoRA policy costs its adapters alone: every other tensor is the base model's own."""
    models = Case(random_pipeline, make_config()).models
    base = {parameter.data_ptr() for parameter in models.base.parameters()}
    own = [p for p in models.policy.parameters() if p.data_ptr() not in base]
    assert {id(p) for p in own} == {id(p) for p in models.weights.values()}
    assert not {p.data_ptr() for p in models.behaviour.parameters()} & base


def test_a_second_adapter_costs_its_factors_alone(random_pipeline: Path) -> None:
    """With `policy.behaviour adapter` the large tensors are there once, and the factors of each are its own."""
    config = make_config()
    models = Case(random_pipeline, replace(config, policy=replace(config.policy, behaviour="adapter"))).models
    base = {parameter.data_ptr() for parameter in models.base.parameters()}
    own = {name: p for name, p in models.behaviour.named_parameters() if p.data_ptr() not in base}
    assert own.keys() == models.weights.keys()
    assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in models.weights.values()}
    assert {p.dtype for p in own.values()} == {models.dtype}


def test_lora_targets_that_match_nothing_are_refused(random_pipeline: Path) -> None:
    config = replace(make_config(), policy=Policy(lora_targets=("attn.to_q", "attn.typo")))
    with pytest.raises(
        UserError, match=r"policy.lora_targets: no linear layer of this transformer is called 'attn.typo'"
    ):
        Case(random_pipeline, config)


def test_moving_average_by_hand() -> None:
    average = MovingAverage({"w": torch.tensor([1.0, 2.0])})
    average.update({"w": torch.tensor([3.0, 6.0])}, decay=0.25)
    assert average.weights["w"].tolist() == [2.5, 5.0]
    average.update({"w": torch.tensor([0.1, 0.7])}, decay=0.0)
    assert torch.equal(average.weights["w"], torch.tensor([0.1, 0.7])), "decay 0 copies to the last bit"


@pytest.mark.parametrize(
    "variant", ["released", "guided KL reference", "guided reference", "EMA reference", "nothing but groups"]
)
def test_equal_groups_are_skipped_exactly(variant: str, random_pipeline: Path) -> None:
    """The gradient and the loss are those of doing all the work; only forwards that a gradient needs are done."""
    found = {}
    for skip in (False, True):
        config = make_config(**VARIANTS[variant])
        case = Case(random_pipeline, replace(config, engine=Engine(skip_equal_groups=skip)))
        case.batch.advantage[SIZE : 2 * SIZE] = 0
        rows = {"base": 0, "behaviour": 0, "policy": 0}
        for name in rows:
            hook = partial(_count_rows, rows, name)
            getattr(case.models, name).register_forward_pre_hook(hook, with_kwargs=True)
        found[skip] = (*case.gradient(micro_batch=2 * SIZE), rows)
    (all_gradient, all_metrics, all_rows), (gradient, metrics, rows) = found[False], found[True]
    assert (gradient - all_gradient).abs().max() < 1e-5 * all_gradient.abs().max()
    assert metrics.keys() == all_metrics.keys()
    for name, value in all_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    timesteps, without_kl = 3, variant == "nothing but groups"
    skipped = {name: (count - rows[name]) // (timesteps * SIZE) for name, count in all_rows.items()}
    assert skipped == {
        "base": int(without_kl),
        "policy": int(without_kl),
        "behaviour": int(variant != "nothing but groups"),
    }


def _count_rows(rows: dict[str, int], name: str, module: object, args: object, kwargs: dict) -> None:
    rows[name] += len(kwargs["hidden_states"])


def test_no_preference_at_all_is_a_gradient_of_zero(random_pipeline: Path) -> None:
    """Not a missing one: the optimizer's momentum goes on."""
    case = Case(random_pipeline, make_config(kl_weight=0.0, clip_range=None))
    case.batch = replace(case.batch, advantage=torch.zeros(GROUPS * SIZE))
    gradient, metrics = case.gradient(micro_batch=12)
    assert gradient.abs().max() == 0
    assert float(metrics["loss"]) == pytest.approx(np.log(2) / case.config.dgpo.beta)
