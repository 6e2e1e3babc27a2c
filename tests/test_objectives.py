"""Diffusion-DPO and Flow-GRPO, rollouts with noise, and objectives from outside the package."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from dgpo_kernels import group_noise, philox_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dgpo_fast.config.objective_options import DiffusionDPO
from dgpo_fast.config.options import Engine
from dgpo_fast.distributed import BatchPart
from dgpo_fast.models.forward import predict
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.diffusion_dpo import DiffusionDPOObjective, best_and_worst
from dgpo_fast.objectives.drift import as_numbers
from dgpo_fast.objectives.levels import Inputs, predict_levels
from dgpo_fast.objectives.registry import load_objective
from dgpo_fast.rollout.schedule import make_schedule
from dgpo_fast.seeds import stream_seed
from tests.objective_case import GROUPS, SIZE, Case, make_config
from tests.objective_configs import assert_same, grpo_case, make_batch, watched


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(-3, 3, width=32)))
def test_pairs_are_best_and_worst(advantage: np.ndarray) -> None:
    """Each group gives its best image with +1 and its worst with −1, in their order, or nothing where all are equal."""
    pairs = best_and_worst(make_batch(advantage))
    assert pairs.group_size == 2 and pairs.groups == len(advantage)
    chosen = advantage.ravel()[pairs.x0.flatten().long()].reshape(-1, 2)
    sign = pairs.advantage.numpy().reshape(-1, 2)
    differ = np.ptp(advantage, axis=1) > 0
    best = np.where(sign[:, 0] > 0, chosen[:, 0], chosen[:, 1])
    worst = np.where(sign[:, 0] > 0, chosen[:, 1], chosen[:, 0])
    assert (best == advantage.max(1)).all() and (worst == advantage.min(1)).all()
    assert (pairs.x0.flatten().long() // advantage.shape[1] == pairs.group_index).all()
    assert (np.sort(sign) == np.where(differ[:, None], [[-1.0, 1.0]], 0.0)).all()


def test_diffusion_dpo_is_dgpo_on_a_pair(random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two with the advantages ±1, no clip, no KL, at one noise level: β times DGPO's loss and gradient."""
    dgpo = make_config(timesteps=1, high_noise_steps=1, clip_range=None, kl_weight=0.0)
    case = Case(random_pipeline, replace(dgpo, diffusion_dpo=DiffusionDPO(beta=dgpo.dgpo.beta, timesteps=1)))
    sign = torch.tensor([1.0, -1.0]).repeat(GROUPS * SIZE // 2)
    pairs = torch.arange(GROUPS * SIZE // 2).repeat_interleave(2)
    schedule = make_schedule("euler", 6, 3.0)
    case.batch = replace(case.batch, advantage=sign, group_index=pairs, group_size=2, schedule=schedule)
    sigma = schedule.sigmas[0].expand(GROUPS * SIZE)
    monkeypatch.setattr(DiffusionDPOObjective, "_noise_levels", lambda *_: sigma)
    group, group_metrics = case.gradient(micro_batch=12)
    case.config = replace(case.config, objective="diffusion_dpo")
    pair, pair_metrics = case.gradient(micro_batch=12)
    beta = dgpo.dgpo.beta
    assert group.abs().max() > 0
    assert torch.linalg.norm(pair - beta * group) < 1e-5 * torch.linalg.norm(pair)
    assert float(pair_metrics["loss"]) == pytest.approx(beta * float(group_metrics["loss"]), rel=1e-5)


def test_diffusion_dpo_is_the_loss_written_out(random_pipeline: Path) -> None:
    """−log sigmoid of the pairs, ε and σ shared in a pair and logit-normal."""
    config = replace(make_config(), objective="diffusion_dpo", diffusion_dpo=DiffusionDPO(beta=40.0, timesteps=2))
    case = Case(random_pipeline, config)
    batch, models = case.batch, case.models
    by_group = batch.advantage.reshape(GROUPS, SIZE)
    best, worst = (i + torch.arange(GROUPS) * SIZE for i in (by_group.argmax(1), by_group.argmin(1)))
    losses = []
    for slot in range(2):
        draw = batch.iteration * 2 + slot
        normal = philox_normal((1,), torch.arange(GROUPS), seed=stream_seed(0, "noise levels"), draw=draw)
        sigma, d = torch.sigmoid(normal.flatten()), {}
        for name, rows in (("best", best), ("worst", worst)):
            x0, seed = batch.x0[rows], stream_seed(0, "training noise")
            noise = group_noise(torch.zeros_like(x0), torch.tensor(1.0), torch.arange(GROUPS), seed=seed, draw=draw)
            level = sigma.reshape(-1, 1, 1, 1)
            x_t, target = (1 - level) * x0 + level * noise, noise - x0
            for model in ("policy", "base"):
                v = predict(getattr(models, model), x_t, 1000 * sigma, batch.text[rows])
                d[name, model] = (v - target).square().mean((1, 2, 3))
        inner = (d["best", "policy"] - d["best", "base"]) - (d["worst", "policy"] - d["worst", "base"])
        losses.append(-torch.nn.functional.logsigmoid(-40.0 / 2 * inner).mean())
    loss = torch.stack(losses).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(models.weights.values()))])
    found, metrics = case.gradient(micro_batch=12)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)


def test_equal_rewards_give_a_pair_without_gradient(random_pipeline: Path) -> None:
    case = Case(random_pipeline, replace(make_config(), objective="diffusion_dpo"))
    case.batch = replace(case.batch, advantage=torch.zeros(GROUPS * SIZE))
    assert case.gradient(micro_batch=12)[0].abs().max() == 0


@pytest.mark.parametrize("objective", ["diffusion_dpo", "flow_grpo"])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_do_not_change_the_gradient(objective: str, micro_batch: int, random_pipeline: Path) -> None:
    """One sample at a time and odd parts give the whole batch's gradient and metrics to 1e-5."""
    if objective == "flow_grpo":
        case = grpo_case(random_pipeline, clip_range=0.02)
    else:
        case = Case(random_pipeline, replace(make_config(), objective=objective))
    whole, whole_metrics = case.gradient(micro_batch=GROUPS * SIZE)
    parts, parts_metrics = case.gradient(micro_batch=micro_batch)
    assert (parts - whole).abs().max() < 1e-5 * whole.abs().max()
    for name, value in whole_metrics.items():
        assert parts_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


SAVING = ["dgpo", "diffusion_dpo", "flow_grpo", "flow_grpo, detached", "flow_grpo with a KL term"]
DETACHED = "flow_grpo with a KL term, detached"


def saving_case(objective: str, folder: Path, **engine: bool) -> Case:
    """Three groups in forwards of 5 samples, with these savings and no others."""
    savings = Engine(**{"batch_timesteps": False, "skip_equal_groups": False, **engine})
    if objective.startswith("flow_grpo"):
        case = grpo_case(
            folder,
            clip_range=0.02,
            kl_weight=0.04 if "KL" in objective else 0.0,
            unconditional_gradient="detached" not in objective,
        )
    else:
        case = Case(folder, replace(make_config(kl_weight=0.0, clip_range=None), objective=objective))
    case.config = replace(case.config, engine=savings)
    return case


@pytest.mark.parametrize("objective", ["dgpo", "diffusion_dpo", "flow_grpo with a KL term", DETACHED])
def test_levels_are_predicted_in_full_batches(objective: str, random_pipeline: Path) -> None:
    """With `engine.batch_timesteps` the reference gets the rows that it gets level by level, in batches of which only
    the last one is not full; what is learnt is the same."""
    one_by_one = watched(saving_case(objective, random_pipeline))
    together = watched(saving_case(objective, random_pipeline, batch_timesteps=True))
    assert_same(together, one_by_one)
    rows, batch = together[2]["base"], 10  # those of a rollout's guided forward of 5 samples
    assert sum(rows) == sum(one_by_one[2]["base"]) and len(rows) < len(one_by_one[2]["base"])
    assert all(count == batch for count in rows[:-1]) and rows[-1] <= batch
    assert together[2]["policy"] == one_by_one[2]["policy"]
    if objective == DETACHED:
        # One row a sample, where the base's pairs have two; those that are trained have none of the empty prompt.
        assert together[2]["constant"] == [count // 2 for count in rows]
        assert sum(together[2]["constant"]) == sum(together[2]["policy"]) == sum(rows) // 2


@pytest.mark.parametrize("objective", SAVING)
def test_groups_that_prefer_nothing_are_left_out(objective: str, random_pipeline: Path) -> None:
    """With `engine.skip_equal_groups` the forwards of an equal group, a third of all, are not made unless a KL term
    needs them; gradient and metrics are those of making them."""
    found = {}
    for skip in (False, True):
        case = saving_case(objective, random_pipeline, skip_equal_groups=skip)
        case.batch.advantage[SIZE : 2 * SIZE] = 0
        found[skip] = watched(case)
    assert_same(found[True], found[False])
    for name in ("base", "policy", "constant"):
        everything, needed = sum(found[False][2][name]), sum(found[True][2][name])
        assert 3 * needed == (3 if "KL" in objective else 2) * everything, name


@pytest.mark.parametrize("objective", SAVING[:-1])
def test_nothing_to_learn_is_a_step_all_the_same(objective: str, random_pipeline: Path) -> None:
    """Where no group prefers anything, no forward is made and the optimizer takes the step of a gradient of 0, from
    its momentum: the one that it takes where every forward is made."""
    after = {}
    for skip in (False, True):
        case = saving_case(objective, random_pipeline, skip_equal_groups=skip)
        weights = list(case.models.weights.values())
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        case.gradient(micro_batch=12)
        optimizer.step()
        before = torch.cat([weight.detach().flatten() for weight in weights])
        case.batch = replace(case.batch, advantage=torch.zeros(GROUPS * SIZE))
        gradient, metrics, rows = watched(case)
        assert gradient.abs().max() == 0 and any(rows["policy"]) is not skip
        expected = {"dgpo": math.log(2) / 100, "diffusion_dpo": math.log(2), "flow_grpo": 0.0}[
            objective.partition(",")[0]
        ]
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        after[skip] = torch.cat([weight.detach().flatten() for weight in weights])
        assert not torch.equal(after[skip], before)
    assert torch.equal(after[True], after[False])


@pytest.mark.parametrize("objective", SAVING)
@pytest.mark.parametrize("equal", [None, 0, 2])
def test_savings_do_not_change_what_processes_learn_together(
    equal: int | None, objective: str, random_pipeline: Path
) -> None:
    """Gradients and metrics of a process with two groups and of one with a group add up to those of one that has all,
    wherever the group is that prefers nothing; a third process has no sample."""
    case = saving_case(objective, random_pipeline, batch_timesteps=True, skip_equal_groups=True)
    if equal is not None:
        case.batch.advantage[equal * SIZE : (equal + 1) * SIZE] = 0
    whole, gradient, metrics = case.batch, 0, {}
    expected = case.gradient(micro_batch=12)
    for first, stop in ((0, 2), (2, 3), (3, 3)):
        rows = slice(first * SIZE, stop * SIZE)
        case.batch = replace(whole[rows], part=BatchPart(rows.start, GROUPS, SIZE, whole.advantage))
        for weight in case.models.weights.values():
            weight.grad = torch.zeros_like(weight)
        part = load_objective(case.config).accumulate(case.batch, case.models, case.old)
        gradient = gradient + torch.cat([weight.grad.flatten() for weight in case.models.weights.values()])
        for name, value in as_numbers(part).items():
            metrics[name] = metrics.get(name, 0.0) + value
    assert_same((gradient, metrics), expected)


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 6))
def test_any_levels_in_any_batches(rows: list[int], batch_size: int) -> None:
    """Every level gets its own predictions, with its own timesteps and prompts, and never before its rows are
    needed."""
    forwards = []

    def forward(x: torch.Tensor, timestep: torch.Tensor, text: TextEmbeds) -> dict[str, torch.Tensor]:
        forwards.append(len(x))
        return {"v": torch.stack([x.flatten(), timestep, text.gathered()["pooled"].flatten()], 1)}

    numbers = torch.arange(7, dtype=torch.float32)
    text = TextEmbeds.of_samples({"pooled": numbers.reshape(-1, 1) / 10})
    levels = []
    for level, count in enumerate(rows):
        x_t = (100 * level + numbers[:count]).reshape(-1, 1, 1, 1)
        timestep = torch.tensor(float(level)) if level % 2 else level + numbers[:count] / 100
        levels.append(Inputs(x_t, timestep, text[torch.arange(count).flip(0)]))
    for level, found in enumerate(predict_levels(forward, levels, batch_size)):
        assert len(forwards) == -(-sum(rows[: level + 1]) // batch_size)
        read = levels[level]
        expected = [read.x_t.flatten(), read.timestep.expand(len(read)), read.text.gathered()["pooled"].flatten()]
        assert torch.equal(found["v"], torch.stack(expected, 1))
    assert max(forwards) <= batch_size and sum(forwards) == sum(rows)


@pytest.mark.parametrize("objective", SAVING)
@pytest.mark.parametrize("micro_batch", [3, 12])
def test_padding_adds_nothing(objective: str, micro_batch: int, random_pipeline: Path) -> None:
    """With sharded weights, processes of two groups, of one and of none send equally many rows through the policy and
    the base, whatever the padding holds; gradients and metrics add up to those of one process."""
    case = saving_case(objective, random_pipeline, batch_timesteps=True)
    whole, gradient, metrics, counts = case.batch, 0, {}, []
    expected = case.gradient(micro_batch)
    edges = tuple(SIZE * group for group in (0, 2, 3, 3))
    for first, stop in pairwise(edges):
        part = BatchPart(first, GROUPS, SIZE, whole.advantage, edges=edges)
        case.batch = whole.taken(torch.arange(first, stop), part)
        assert (len(case.batch.x0), case.batch.own) == (2 * SIZE, stop - first)
        assert case.batch.weight.tolist() == [1.0] * (stop - first) + [0.0] * case.batch.padding
        mine = watched(case, micro_batch)
        gradient = gradient + mine[0]
        counts.append(mine[2])
        for name, value in mine[1].items():
            metrics[name] = metrics.get(name, 0.0) + value
    assert counts[0] == counts[1] == counts[2]
    assert_same((gradient, metrics), expected)
