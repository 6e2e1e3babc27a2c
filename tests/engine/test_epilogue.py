"""A GELU inside the product before it: the same numbers, in forwards without a gradient alone."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dgpo_fast.config.options import Engine
from dgpo_fast.engine import engine, epilogue
from dgpo_fast.engine.choices import choose
from dgpo_fast.engine.epilogue import EpilogueGELU, use_epilogue
from dgpo_fast.errors import UserError
from tests.engine.cases import EngineCase, make_config
from tests.engine.test_choices import HERE


def layers(transformer: nn.Module) -> set[type]:
    return {type(module) for module in transformer.modules() if isinstance(module, GELU)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_layer_computes_what_diffusers_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = GELU(12, 20, approximate="tanh").to(dtype), torch.randn(5, 7, 24, dtype=dtype)[..., ::2]
    fused = copy.deepcopy(layer)
    use_epilogue(fused)
    with torch.no_grad():
        assert type(fused) is EpilogueGELU and torch.equal(fused(x), layer(x))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    gradients = [torch.autograd.grad(one(x).square().sum(), list(one.parameters())) for one in (fused, layer)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_gpu_s_product_has_the_arguments_it_needs() -> None:
    """Run on a CPU, where torch's GELU in a product is the exact one: at most 5e-4 from the tanh approximation."""
    torch.manual_seed(0)
    layer, x = GELU(12, 20, approximate="tanh"), torch.randn(5, 7, 24)[..., ::2]
    with torch.no_grad():
        found = epilogue._on_a_gpu(x, layer.proj.weight, layer.proj.bias)
        assert found.shape == (5, 7, 20) and torch.allclose(found, layer(x), atol=5e-4)


def test_the_operator_is_well_defined_and_counted() -> None:
    x, layer = torch.randn(3, 5, 12), GELU(12, 20, approximate="tanh")
    torch.library.opcheck(torch.ops.dgpo_fast.linear_gelu, (x, layer.proj.weight.detach(), layer.proj.bias.detach()))
    counts = []
    for on in (False, True):
        use_epilogue(layer, on)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 15 * 12 * 20


def test_layers_that_compute_something_else_stay() -> None:
    others = nn.Sequential(GELU(4, 4), GELU(4, 4, approximate="tanh", bias=False))
    use_epilogue(others)
    assert layers(others) == {GELU}


def test_pictures_and_gradient_are_those_of_the_plain_path(random_pipeline: Path) -> None:
    cases = [EngineCase(random_pipeline, make_config(epilogue=on), torch.float64) for on in ("off", "on")]
    for plain, fused in zip(*((case.rollout(), *case.gradient()) for case in cases), strict=True):
        assert torch.linalg.norm(plain - fused) <= 1e-12 * torch.linalg.norm(plain)
    models = cases[1].models
    assert layers(models.base) == layers(models.behaviour) == {EpilogueGELU} and layers(models.policy) == {GELU}


def test_float8_rollouts_have_none(random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Copied:
        layers = ()

        def __init__(self, source: nn.Module):
            self.transformer = copy.deepcopy(source)

        def refresh(self) -> None:
            pass

    monkeypatch.setattr(engine, "Float8Copy", Copied)
    monkeypatch.setattr(engine, "choose", lambda *args: (chosen, reasons))
    chosen, reasons = choose(Engine(attention="native", linear="torch", epilogue="on"), HERE)
    case = EngineCase(random_pipeline, make_config(rollout_precision="fp8"))
    assert layers(case.engine.rollout_transformer) == {GELU} and layers(case.models.behaviour) == {EpilogueGELU}


def test_asked_for_beside_float8_rollouts() -> None:
    line = r"^engine.epilogue on: float8 rollouts have no product with a GELU in it; use --engine.epilogue auto, which"
    with pytest.raises(UserError, match=line):
        choose(Engine(epilogue="on", rollout_precision="fp8", attention="native", linear="torch"), HERE)
