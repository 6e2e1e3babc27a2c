"""A base in 4 or 8 bits, in every family."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxPipeline
from safetensors.torch import load_file

from dgpo_fast.config.options import Policy
from dgpo_fast.memory.simulate import Simulation, Trained
from dgpo_fast.models.family import attach
from dgpo_fast.models.forward import predict
from dgpo_fast.models.meta import sample_shape
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.models.quantised import quantise_blocks, quantised_layers
from dgpo_fast.train import train
from tests.families.case import Case
from tests.families.flux1 import CASE as FLUX1
from tests.families.test_end_to_end import PROMPTS, settings
from tests.families.test_memory import BATCH, real_peak
from tests.families.test_pictures import CASES
from tests.runs import untimed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_family_trains_on_a_quantised_base(case: Case, tmp_path: Path) -> None:
    """Blocks are rounded; adapters and a merged copy agree on what is rounded; the memory is predicted."""
    pipeline = case.make()
    family = case.family_of(pipeline, tmp_path)
    transformer = attach(copy.deepcopy(pipeline.transformer), family)
    before = sum(parameter.numel() for parameter in transformer.parameters())
    quantise_blocks(transformer, "nf4", "cpu")
    rounded = sum(layer.in_features * layer.out_features for layer in quantised_layers(transformer))
    assert rounded > 0.2 * before, "small models have large embeddings"
    models = PolicyModels(transformer, Policy(lora_rank=4, base_precision="nf4"), seed=0)
    embedded = family.guidance(max(case.scales.values())).embedded is not None
    shape = sample_shape(family, family.latent_shape(*case.size), case.length, embedded=embedded)
    text, x_t = shape.text(BATCH, models.dtype, "cpu"), torch.randn(BATCH, *shape.latent)
    models.load_behaviour({name: weight + 0.1 for name, weight in models.weights.items()})
    models.load_weights({name: weight + 0.1 for name, weight in models.weights.items()})
    policy, behaviour = (predict(model, x_t, torch.tensor(500.0), text) for model in (models.policy, models.behaviour))
    assert torch.allclose(policy, behaviour, rtol=1e-3, atol=1e-3 * float(behaviour.abs().max()))
    simulated = Simulation(family, Trained("fp32", (4, ()), base_precision="nf4"), torch.float32, shape)
    assert simulated.training(BATCH).peak == pytest.approx(real_peak(models, shape), rel=0.05)


def test_a_run_is_resumed_and_diffusers_loads_its_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1 in 4 bits, with the behaviour as an adapter: resumed as undisturbed, and its LoRA is a plain one."""
    monkeypatch.chdir(tmp_path)
    FLUX1.make().save_pretrained("model")
    Path("prompts.txt").write_text(PROMPTS)
    given: dict[str, Any] = settings(FLUX1)
    given["engine"] = {"attention": "native", "linear": "torch"}  # not what is faster at the moment
    given["policy"] |= {"base_precision": "nf4", "behaviour": "adapter", "train": "lora"}
    Path("small.yaml").write_text(yaml.safe_dump(given))
    assert train(["small.yaml", "--name", "whole"]) == 0
    assert train(["small.yaml", "--name", "run", "--iterations", "1"]) == 0
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    assert untimed(Path("runs/run")) == untimed(Path("runs/whole"))
    pipeline = FluxPipeline.from_pretrained("model")
    pipeline.load_lora_weights("runs/run")
    loaded = [weight for name, weight in pipeline.transformer.named_parameters() if "lora_B" in name]
    assert len(loaded) == len(load_file("runs/run/pytorch_lora_weights.safetensors")) // 2
    assert all(weight.abs().max() > 0 for weight in loaded)
