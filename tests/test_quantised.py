"""A base in 4 or 8 bits: the arithmetic of its layers, whole runs on it, and text encoders in few bits."""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import quantised_base
from benchmarks.pages import PERFORMANCE, part
from dgpo_fast.config.options import Config
from dgpo_fast.engine import compile
from dgpo_fast.errors import UserError
from dgpo_fast.models.forward import predict
from dgpo_fast.models.loading import load_pipeline, text_encoders
from dgpo_fast.models.prompt_encoder import PromptEncoder, cache_scope
from dgpo_fast.models.quantised import QuantisedLinear, numel, quantise_blocks, quantised_layers, widen
from dgpo_fast.run.start import resumed_config
from dgpo_fast.train import train
from tests.engine import cases
from tests.engine.cases import EngineCase, make_config
from tests.runs import untimed

CPU = torch.device("cpu")
PRECISIONS = ("int8", "nf4")
BITS = {"int8": 8.125, "nf4": 4.127}
ROUNDING = {"int8": (0.004, 0.01), "nf4": (0.05, 0.12)}
"""Of normal numbers, the share of their norm that the error's is."""


def layer_of(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(192, 1024, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_computes_with_its_widened_weight(precision: str, dtype: torch.dtype) -> None:
    """Output and gradient, to the last bit, eager and compiled; the backward saves the packed weight alone."""
    plain = layer_of(dtype)
    nn.init.normal_(plain.weight)
    layer = QuantisedLinear(plain, precision, "cpu")
    smallest, largest = ROUNDING[precision]
    error = torch.linalg.norm((layer.weight - plain.weight).float()) / torch.linalg.norm(plain.weight.float())
    assert smallest < error < largest
    assert 8 * layer.packed_bytes / plain.weight.numel() == pytest.approx(BITS[precision], rel=2e-3)
    x, saved = torch.randn(5, 7, 192, dtype=dtype).requires_grad_(), []
    expected = F.linear(x, layer.weight, plain.bias)
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            found = one(x)
        assert torch.equal(found, expected)
        for out in (found, expected):
            out.square().sum().backward(retain_graph=True)
        # One gradient added to an equal one.
        assert torch.equal(x.grad, 2 * torch.autograd.grad(expected.square().sum(), x, retain_graph=True)[0])  # type: ignore[arg-type]
        x.grad = None
    assert not any(tensor.is_floating_point() and tensor.shape == plain.weight.shape for tensor in saved)


def on_quantised_base(precision: str, **settings: Any) -> Config:
    config = make_config(**{name: value for name, value in settings.items() if name != "policy"})
    return replace(config, policy=replace(config.policy, base_precision=precision, **settings.get("policy", {})))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_is_that_of_a_model_with_the_widened_weights(
    precision: str, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollout, loss and gradient, to the last bit; not of the model that was not rounded."""
    quantised, plain = (
        EngineCase(random_pipeline, on_quantised_base(precision)),
        EngineCase(random_pipeline, make_config()),
    )
    assert quantised_layers(quantised.models.base) and quantised_layers(quantised.models.policy)
    assert not quantised_layers(quantised.models.behaviour)
    assert numel(quantised.models.base) == numel(plain.models.base)

    def rounded(transformer: Any, *how: Any) -> None:
        quantise_blocks(transformer, *how)
        widen(transformer)

    monkeypatch.setattr(cases, "quantise_blocks", rounded)
    widened = EngineCase(random_pipeline, on_quantised_base(precision))
    assert not quantised_layers(widened.models.base)
    expected, far = outcome(widened), outcome(plain)
    assert all(torch.equal(a, b) for a, b in zip(outcome(quantised), expected, strict=True))
    assert all(torch.linalg.norm(a - b) > 1e-3 * torch.linalg.norm(b) for a, b in zip(far, expected, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": {"behaviour": "adapter"}},
        {"policy": {"forward": "merged"}},
        {"checkpointing": "blocks"},
        {"checkpointing": "selective"},
        {"compile": "on"},
        {"epilogue": "on"},
    ],
    ids=str,
)
def test_every_way_through_a_run_computes_the_same(
    settings: dict[str, Any], random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compile, "BACKEND", "eager")
    found = outcome(EngineCase(random_pipeline, on_quantised_base("nf4", **settings)))
    for mine, theirs in zip(found, plainly(random_pipeline), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@cache
def plainly(folder: Path) -> tuple[Tensor, ...]:
    return outcome(EngineCase(folder, on_quantised_base("nf4")))


def outcome(case: EngineCase) -> tuple[Tensor, ...]:
    return case.rollout(), *case.gradient()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_begins_at_its_reference(precision: str, random_pipeline: Path) -> None:
    """Policy and behaviour predict what the base does before the first step, whichever way they compute."""
    for policy in ({}, {"behaviour": "adapter"}, {"forward": "merged"}):
        case = EngineCase(random_pipeline, on_quantised_base(precision, policy=policy))
        models, batch = case.models, case.batch()
        models.load_weights({name: torch.zeros_like(weight) for name, weight in models.weights.items()})
        models.load_behaviour(models.initial_weights())
        with torch.no_grad():
            of_base, *others = (
                predict(model, batch.x0, torch.tensor(700.0), batch.text)
                for model in (models.base, models.policy, models.behaviour)
            )
        assert all(torch.equal(other, of_base) for other in others)


def test_in_bf16_with_weights_in_fp32(random_pipeline: Path) -> None:
    """Under autocast, gradients are near those of a run whose LoRA is in bf16."""
    found = []
    for weights in ("fp32", "bf16_master"):
        case = EngineCase(random_pipeline, on_quantised_base("nf4", policy={"weights": weights}), torch.bfloat16)
        found.append(case.gradient()[1])
    assert torch.linalg.norm(found[0] - found[1]) < 0.2 * torch.linalg.norm(found[1])


def test_flops_are_those_of_the_plain_model(random_pipeline: Path) -> None:
    """A layer that is widened multiplies as often, forward and backward."""
    counted = []
    for config in (make_config(), on_quantised_base("nf4")):
        case = EngineCase(random_pipeline, config)
        batch = case.batch()
        with FlopCounterMode(display=False) as counter:
            predict(case.models.policy, batch.x0, torch.tensor(700.0), batch.text).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(("precision", "behaviour"), [("nf4", "adapter"), ("int8", "merged")])
def test_a_run_is_resumed_and_diffusers_loads_its_lora(
    precision: str, behaviour: str, workspace: Path, random_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an undisturbed one ends. It says that it is inexact, and keeps its precision."""
    settings = ["small.yaml", "--policy.base-precision", precision, "--policy.behaviour", behaviour]
    settings += ["--text-precision", precision, "--engine.attention", "native", "--engine.linear", "torch"]
    assert train([*settings, "--iterations", "3", "--name", "whole"]) == 0
    assert f"base in {precision}, INEXACT: " in capsys.readouterr().out
    assert train([*settings, "--iterations", "2"]) == 0
    assert train(["--resume", "runs/run", "--iterations", "3"]) == 0
    assert untimed(Path("runs/run")) == untimed(Path("runs/whole"))
    assert resumed_config(Path("runs/run"), []).policy.base_precision == precision
    with pytest.raises(UserError, match=r"'policy.base_precision' cannot change within a run"):
        resumed_config(Path("runs/run"), ["--policy.base-precision", "same"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(random_pipeline)
    pipeline.load_lora_weights("runs/run")
    loaded = {name: weight for name, weight in pipeline.transformer.named_parameters() if "lora_" in name}
    saved = load_file("runs/run/pytorch_lora_weights.safetensors")
    assert len(loaded) == len(saved) > 0
    for name, weight in loaded.items():
        assert torch.equal(weight, saved[f"transformer.{name.replace('.default_0', '')}"])


def test_a_start_lora_is_merged_before_the_base_is_rounded(workspace: Path) -> None:
    """A run on what another one has saved begins where that one ended, but for rounding."""
    assert train(["small.yaml", "--name", "first"]) == 0
    for precision in ("same", "int8"):
        more = ["--lora", "runs/first", "--iterations", "1", "--policy.base-precision", precision]
        assert train(["small.yaml", *more, "--name", precision]) == 0
    rewards = [untimed(Path("runs") / name)[0]["reward_mean"] for name in ("same", "int8")]
    assert rewards[0] != rewards[1] and rewards[1] == pytest.approx(rewards[0], rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_text_encoders_in_few_bits(precision: str, random_pipeline: Path) -> None:
    """Embeddings near those of the whole encoders, from a tenth to a half of their linear layers' memory."""
    pipeline = load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32, with_text=False)
    plain, encoder = PromptEncoder(pipeline, 9), PromptEncoder(pipeline, 9, precision=precision)
    exact, found = (one(["a cat", "two birds"]).rows for one in (plain, encoder))
    for name, rows in found.items():
        assert 0 < torch.linalg.norm(rows - exact[name]) < 0.4 * torch.linalg.norm(exact[name])
    layers = [layer for module in text_encoders(encoder.encoders) for layer in quantised_layers(module)]  # type: ignore[arg-type]
    assert layers and all(layer.packed_bytes < 0.4 * layer.weight.nbytes for layer in layers)
    scopes = [cache_scope(pipeline, 9, "encoders", one) for one in ("same", *PRECISIONS)]
    assert len({str(scope) for scope in scopes}) == 3 and scopes[0] == cache_scope(pipeline, 9, "encoders")


def test_the_benchmark_measures_what_rounding_changes(
    tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small model: 4 bits are further away than 8, and every number of the tables is there."""
    monkeypatch.setattr(quantised_base, "RECIPE", ["small.yaml"])
    small = ["--iterations", "1", "--groups", "2", "--images", "4", "--seeds", "0", "--device", "cpu"]
    quantised_base.main([*small, "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out/quantised_base.json").read_text())
    exact, int8, nf4 = (report["before_training"][base] for base in quantised_base.BASES)
    assert exact["rounded_share"] == 0 < int8["rounded_share"] == nf4["rounded_share"]
    assert 0 < int8["pictures"] < nf4["pictures"] and 0 < int8["gradient_error"] < nf4["gradient_error"]
    assert nf4["gradient_cosine"] < int8["gradient_cosine"] <= 1
    assert [one["base"] for one in report["runs"]] == list(quantised_base.BASES)
    assert capsys.readouterr().out.count("\n| 4 bits | ") == 2


def test_the_page_has_the_committed_tables() -> None:
    report = json.loads(quantised_base.CPU_RESULT.read_text(encoding="utf-8"))
    assert part("quantised_base", PERFORMANCE) == quantised_base.tables(report)


def test_without_bitsandbytes(random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^weights in nf4 need the package bitsandbytes: pip install bitsandbytes$"):
        EngineCase(random_pipeline, on_quantised_base("nf4"))
