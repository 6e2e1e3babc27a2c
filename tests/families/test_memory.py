"""What a family's forward and backward take is predicted without data."""

from typing import Any

import pytest
import torch

from dgpo_fast.config.options import Policy
from dgpo_fast.memory.live import LiveBytes
from dgpo_fast.memory.simulate import Simulation, Trained
from dgpo_fast.models.family import attach
from dgpo_fast.models.forward import predict
from dgpo_fast.models.meta import SampleShape, sample_shape
from dgpo_fast.models.policy import PolicyModels
from tests.families.case import Case
from tests.families.test_pictures import CASES

BATCH = 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("what", ["lora", "full"])
def test_simulated_training_takes_what_the_real_one_does(
    case: Case, what: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With masks of attention, which blocks save too."""
    pipeline = case.make()
    family = case.family_of(pipeline, tmp_path_factory.mktemp(case.name))
    embedded = family.guidance(max(case.scales.values())).embedded is not None
    shape = sample_shape(family, family.latent_shape(*case.size), case.length, embedded=embedded)
    simulated = Simulation(family, Trained("fp32", (4, ()) if what == "lora" else None), torch.float32, shape)
    policy = Policy(train=what, lora_rank=4, weights="fp32")
    models = PolicyModels(attach(pipeline.transformer, family), policy, seed=0)
    assert simulated.training(BATCH).peak == pytest.approx(real_peak(models, shape), rel=0.05)


def real_peak(models: PolicyModels, shape: SampleShape) -> int:
    """Peak bytes of a forward and backward of real tensors, beside weights and gradients."""
    for weight in models.weights.values():
        weight.grad = torch.zeros_like(weight)
    there = [*models.policy.parameters(), *models.policy.buffers(), *(w.grad for w in models.weights.values())]
    text, x_t = shape.text(BATCH, models.dtype, "cpu"), torch.randn(BATCH, *shape.latent)
    with LiveBytes([tensor for tensor in there if tensor is not None]) as live:
        start = live.now
        out = predict(models.policy, x_t, torch.tensor(500.0), text)
        out.backward(torch.ones_like(out))
    return live.peak - start
