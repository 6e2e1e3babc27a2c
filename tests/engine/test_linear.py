"""Linear layers by oneDNN: the same numbers, gradients, names and weights."""

import pytest
import torch
from diffusers.models.activations import GELU
from peft import LoraConfig, get_peft_model
from torch import nn

from dgpo_fast.engine import linear
from dgpo_fast.engine.linear import OneDNNGELU, OneDNNLinear, use_onednn

pytestmark = pytest.mark.skipif(not linear.available(), reason="this build of torch has no oneDNN")


def grads(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("shape", [(5, 7, 12), (3, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_same_output_and_gradient(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 20, bias=bias), torch.randn(shape)
    expected = grads(layer, x)
    use_onednn(layer)
    assert type(layer) is OneDNNLinear
    for found, wanted in zip(grads(layer, x), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected[0], atol=1e-5)


def test_slices_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 20), torch.randn(4, 9, 24)[:, 2:7, ::2]
    expected = grads(layer, x)
    use_onednn(layer)
    for found, wanted in zip(grads(layer, x), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_gelu_is_fused_where_no_gradient_is_wanted() -> None:
    torch.manual_seed(0)
    layer, x = GELU(12, 20, approximate="tanh"), torch.randn(5, 7, 12)
    expected = layer(x)
    use_onednn(layer)
    assert type(layer) is OneDNNGELU
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_an_adapter_around_a_projection_is_called() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(GELU(12, 20, approximate="tanh")), LoraConfig(target_modules=["proj"], r=2))
    nn.init.normal_(model.base_model.model[0].proj.lora_B["default"].weight)
    x = torch.randn(5, 12)
    with torch.no_grad():
        expected = model(x)
        use_onednn(model)
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_back_to_torchs_own() -> None:
    module = nn.Sequential(nn.Linear(4, 4), GELU(4, 4, approximate="tanh"))
    names = list(module.state_dict())
    use_onednn(module)
    assert list(module.state_dict()) == names
    use_onednn(module, False)
    assert [type(child) for child in module] == [nn.Linear, GELU]
    assert type(module[1].proj) is nn.Linear


def test_operators_are_well_defined() -> None:
    x, weight, bias = torch.randn(3, 5, 12), torch.randn(20, 12), torch.randn(20)
    ops, gradient = torch.ops.dgpo_fast, torch.randn(3, 5, 20)
    torch.library.opcheck(ops.linear, (x, weight, bias, "gelu"))
    torch.library.opcheck(ops.linear_input_gradient, (gradient, weight))
    torch.library.opcheck(ops.linear_weight_gradient, (gradient, x))
