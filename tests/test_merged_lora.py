"""A policy that computes with merged weights: PEFT's gradient, on every way through a run."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dgpo_fast.config.options import Policy
from dgpo_fast.engine import compile
from dgpo_fast.errors import UserError
from dgpo_fast.models.forward import predict
from dgpo_fast.models.merged_lora import merge_all, use_merged_weights
from dgpo_fast.models.policy import is_merged
from dgpo_fast.train import train
from tests.engine.cases import EngineCase, make_config
from tests.runs import untimed

F64 = torch.float64


def close(found: Tensor, expected: Tensor) -> bool:
    """To 1e-12 of its norm."""
    return bool(torch.linalg.norm(found - expected) <= 1e-12 * torch.linalg.norm(expected))


def adapted(dtype: torch.dtype = F64, bias: bool = True) -> nn.Module:
    """One layer with an adapter that does something; alpha / rank is no power of two."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], r=3, lora_alpha=5.0, init_lora_weights="gaussian")
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20, bias=bias)), config).to(dtype)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.1)
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7, 12), (3, 12)])
def test_a_layer_has_pefts_output_and_gradient(shape: tuple[int, ...], bias: bool) -> None:
    model = adapted(bias=bias)
    merged = copy.deepcopy(model)
    merge_all(use_merged_weights(merged))
    assert list(merged.state_dict()) == list(model.state_dict())
    found = []
    for one in (model, merged, torch.compile(merged, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 12 * shape[0] * (shape[1] if len(shape) == 3 else 1), dtype=F64).reshape(shape)
        x.requires_grad_()
        out = one(x)
        weights = [weight for weight in one.parameters() if weight.requires_grad]
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *weights])])
    assert len(found[0]) == 4
    for mine in found[1:]:
        assert all(close(a, b) for a, b in zip(mine, found[0], strict=True))


@cache
def computed(folder: Path | str, forward: str, micro_batch: int = 8, **engine: Any) -> tuple[Tensor, ...]:
    """Latents, loss and gradient in float64 after three steps of gradient descent, and the weights then."""
    config = make_config(**engine)
    policy = replace(config.policy, forward=forward, micro_batch=micro_batch)
    case = EngineCase(folder, replace(config, policy=policy), F64)
    assert case.models.merged == (forward == "merged")
    for _ in range(3):
        case.gradient()
        for name, weight in case.models.weights.items():
            assert weight.grad is not None
            case.new[name] = weight.detach() - 0.1 * weight.grad
        case.models.load_weights(case.new)
    return case.rollout(), *case.gradient(), torch.cat([weight.flatten() for weight in case.new.values()])


@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch": 2}, {"checkpointing": "blocks"}, {"checkpointing": "selective"}, {"compile": "on"}],
    ids=str,
)
def test_a_run_has_pefts_gradient(
    settings: dict[str, Any], random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    pairs = zip(computed(random_pipeline, "merged", **settings), computed(random_pipeline, "adapter"), strict=True)
    assert all(close(found, expected) for found, expected in pairs)


def test_a_run_of_the_shipped_pipeline_has_pefts_gradient() -> None:
    assert all(close(a, b) for a, b in zip(computed("tiny", "merged"), computed("tiny", "adapter"), strict=True))


@pytest.mark.parametrize("weights", ["fp32", "bf16_master"])
def test_in_bf16_it_is_as_near_to_float64_as_adapters(weights: str, random_pipeline: Path) -> None:
    found = {}
    for forward, dtype in (("adapter", F64), ("adapter", torch.bfloat16), ("merged", torch.bfloat16)):
        config = make_config()
        storage = weights if dtype == torch.bfloat16 else "fp32"
        policy = replace(config.policy, forward=forward, weights=storage)  # type: ignore[arg-type]
        case = EngineCase(random_pipeline, replace(config, policy=policy), dtype)
        found[forward, dtype] = case.gradient()[1]
        assert all(weight.grad.dtype in (torch.float32, F64) for weight in case.models.weights.values())  # type: ignore[union-attr]
    exact = found["adapter", F64]
    errors = {forward: torch.linalg.norm(found[forward, torch.bfloat16] - exact) for forward in ("adapter", "merged")}
    assert errors["merged"] <= 2 * errors["adapter"]


def test_rollout_and_policy_are_one_arithmetic(random_pipeline: Path) -> None:
    """In bf16, the behaviour copy and the policy predict the same to the last bit if their weights are the same."""
    config = make_config()
    case = EngineCase(random_pipeline, replace(config, policy=replace(config.policy, forward="merged")), torch.bfloat16)
    case.models.load_behaviour(case.models.weights)
    batch = case.batch()
    with torch.no_grad():
        a, b = (
            predict(models, batch.x0, torch.tensor(500.0), batch.text)
            for models in (case.models.policy, case.models.behaviour)
        )
    assert torch.equal(a, b)


def test_the_share_of_the_lora_that_bf16_keeps() -> None:
    """By hand: above W = 1 numbers are 1/128 apart; one update is kept whole, one is rounded up, one is lost."""
    model = adapted(torch.bfloat16)
    (layer,) = use_merged_weights(model)
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.zero_()[0, :3] = torch.tensor([2 / 128, 1.25 / 256, 0.5 / 256]) * 3 / 5
        layer.lora_B["default"].weight.zero_()[0, 0] = 1.0
    updates = [5 / 3 * float(a) for a in layer.lora_A["default"].weight[0, :3].detach()]
    kept = (2 / 128 * updates[0] + 1 / 128 * updates[1]) / sum(update**2 for update in updates)
    assert float(merge_all([layer])) == pytest.approx(kept, rel=1e-5)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert float(merge_all([layer])) == 1.0  # type: ignore[arg-type]


def test_a_run_logs_what_is_kept(workspace: Path) -> None:
    args = ["small.yaml", "--iterations", "2", "--policy.forward", "merged", "--precision", "bf16"]
    assert train([*args, "--name", "run"]) == 0
    shares = [line["lora_merge_kept"] for line in untimed(workspace / "runs/run")]
    assert shares[0] == 1.0 and 0.2 < shares[1] < 1.5 and shares[1] != 1.0


def test_auto_is_for_a_gpu_with_a_merged_rollout() -> None:
    assert is_merged(Policy(), on_gpu=True) and not is_merged(Policy(), on_gpu=False)
    assert not is_merged(Policy(behaviour="adapter"), on_gpu=True) and not is_merged(Policy(train="full"), on_gpu=True)
    assert is_merged(Policy(forward="merged"), on_gpu=False)


def test_asked_for_where_there_is_no_lora(workspace: Path) -> None:
    line = (
        "^policy.forward merged is for LoRA: use --policy.train lora, or leave out --policy.forward with --policy.train"
    )
    with pytest.raises(UserError, match=line):
        train(["small.yaml", "--policy.forward", "merged", "--policy.train", "full", "--name", "run"])
    assert not Path("runs/run").exists()
