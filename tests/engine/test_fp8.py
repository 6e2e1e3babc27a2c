"""Rollouts in float8: where they can be had, and that they follow the behaviour copy's weights."""

from pathlib import Path

import pytest
import torch

from dgpo_fast.engine import fp8
from dgpo_fast.engine.fp8 import Float8Copy, quantised
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import family_of
from dgpo_fast.models.forward import predict
from tests.engine.cases import EngineCase, make_config


def test_a_cpu_has_no_float8(random_pipeline: Path) -> None:
    line = r"^engine.rollout_precision fp8: a CPU has no float8; use --engine.rollout-precision same$"
    with pytest.raises(UserError, match=line):
        EngineCase(random_pipeline, make_config(rollout_precision="fp8"))


def test_layers_that_see_every_token_are_quantised(random_pipeline: Path) -> None:
    transformer = EngineCase(random_pipeline, make_config()).models.base
    names = {
        n
        for n, m in transformer.named_modules()
        if isinstance(m, torch.nn.Linear) and quantised(family_of(transformer), n, m)
    }
    assert {
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn2.to_v",
        "transformer_blocks.1.ff.net.2",
    } <= names
    assert not any("norm" in name or not name.startswith("transformer_blocks") for name in names)


def test_the_copy_follows_the_behaviour_weights_in_place(
    random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the bf16 prediction, and after other weights were loaded near the new one, at the same addresses."""
    api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(fp8, "check_float8", lambda device: None)
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
    case = EngineCase(random_pipeline, make_config(), torch.bfloat16)
    copied = Float8Copy(case.models.behaviour)
    case.models.after_load.append(copied.refresh)
    batch, timestep = case.batch(), torch.tensor(700.0)
    addresses = [layer.weight.qdata.data_ptr() for _, layer in copied.layers]
    predictions = []
    with torch.no_grad():
        for weights in (case.old, {name: 3 * weight for name, weight in case.new.items()}):
            case.models.load_behaviour(weights)
            exact = predict(case.models.behaviour, batch.x0, timestep, batch.text)
            found = predict(copied.transformer, batch.x0, timestep, batch.text)
            assert 0 < torch.linalg.norm(found - exact) < 0.15 * torch.linalg.norm(exact)
            predictions.append(exact)
    assert torch.linalg.norm(predictions[1] - predictions[0]) > 0.3 * torch.linalg.norm(predictions[0])
    assert [layer.weight.qdata.data_ptr() for _, layer in copied.layers] == addresses
