"""What the public functions refuse, what "auto" chooses, and that nothing needs triton."""

import logging
import subprocess
import sys

import pytest
import torch
from dgpo_kernels import dgpo_loss, dispatch, group_noise, guided_dpmpp_2m_step, guided_euler_step, ops, philox_normal

INDEX = torch.tensor([0, 0, 1])
X = torch.randn(3, 4, 2, 2)
NOISE = {"seed": 1, "draw": 2}


def noise(**changes):
    return group_noise(**({"x0": X, "sigma": torch.rand(3), "group_index": INDEX, **NOISE} | changes))


def loss(**changes):
    case = {"policy_v": X, "ref_v": X, "x0": X, "advantage": torch.ones(3), "group_index": INDEX, "beta": 1.0}
    return dgpo_loss(**(case | NOISE | changes))


def euler(**changes):
    case = {"x": X, "v_cond": X, "v_uncond": X, "guidance_scale": 2.0, "coefficients": torch.ones(1)}
    return guided_euler_step(**(case | changes))


def dpmpp(**changes):
    case = {"x": X, "v_cond": X, "v_uncond": None, "x0_prev": None, "guidance_scale": 2.0}
    return guided_dpmpp_2m_step(**(case | {"coefficients": torch.ones(4)} | changes))


MISTAKES = [
    (noise, {"x0": X.long()}, TypeError, "x0: expected one of float32.*got torch.int64"),
    (noise, {"x0": [1.0]}, TypeError, "x0: expected a tensor, got list"),
    (noise, {"x0": torch.randn(3)}, ValueError, r"x0: expected shape \(B, ...\).*got \(3,\)"),
    (noise, {"x0": torch.randn(3, 0)}, ValueError, "x0: expected 1 to 2.*elements in a sample, got 0"),
    (noise, {"sigma": torch.rand(2)}, ValueError, r"sigma: expected shape \(\) or \(3,\), got \(2,\)"),
    (noise, {"sigma": 0.5}, TypeError, "sigma: expected a tensor, got float"),
    (noise, {"group_index": INDEX.int()}, TypeError, r"group_index: expected an int64 tensor.*got torch.int32"),
    (noise, {"group_index": INDEX[:2]}, ValueError, r"group_index: expected shape \(3,\), got \(2,\)"),
    (noise, {"group_index": INDEX.to("meta")}, ValueError, "group_index: expected a tensor on cpu, got one on meta"),
    (noise, {"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
    (noise, {"seed": 1.5}, TypeError, "seed: expected an int or a 0-dim int64 tensor, got float"),
    (noise, {"draw": -1}, ValueError, "draw: expected 0 <= draw"),
    (noise, {"draw": torch.tensor([1])}, TypeError, r"draw: expected a 0-dim int64 tensor.*shape \(1,\)"),
    (noise, {"draw": torch.tensor(1, device="meta")}, ValueError, "draw: expected a tensor on cpu, got one on meta"),
    (noise, {"impl": "cuda"}, ValueError, "impl: expected one of 'auto', 'eager', 'compile', 'triton', got 'cuda'"),
    (loss, {"ref_v": X[:2]}, ValueError, r"ref_v: expected policy_v's shape \(3, 4, 2, 2\), got \(2, 4, 2, 2\)"),
    (loss, {"x0": X.to("meta")}, ValueError, "x0: expected a tensor on cpu, got one on meta"),
    (loss, {"advantage": torch.ones(3, 1)}, ValueError, r"advantage: expected shape \(3,\), got \(3, 1\)"),
    (loss, {"beta": 0.0}, ValueError, "beta: expected a positive number, got 0.0"),
    (loss, {"clip_range": 0.1}, ValueError, "clip_range: needs old_v"),
    (loss, {"clip_range": -1.0, "old_v": X}, ValueError, "clip_range: expected a positive number or None, got -1.0"),
    (loss, {"kl_weight": 0.1}, ValueError, "kl_weight: 0.1 needs kl_v"),
    (loss, {"kl_weight": -0.1, "kl_v": X}, ValueError, "kl_weight: expected a number >= 0"),
    (loss, {"num_groups": 0}, ValueError, "num_groups: expected a positive integer or None, got 0"),
    (loss, {"group_size": -2}, ValueError, "group_size: expected a positive integer or None, got -2"),
    (loss, {"reduce_group_scores": lambda s: s.sum()}, ValueError, r"reduce_group_scores: expected .*\(3,\).*got \(\)"),
    (euler, {"x": X.half()}, TypeError, "x: the state is kept in float32, got torch.float16"),
    (euler, {"v_cond": X[:1]}, ValueError, r"v_cond: expected x's shape"),
    (euler, {"coefficients": torch.ones(4)}, ValueError, r"coefficients: expected shape \(1,\), got \(4,\)"),
    (dpmpp, {"x0_prev": X.half()}, TypeError, "x0_prev: the state is kept in float32"),
    (dpmpp, {"coefficients": torch.ones(1)}, ValueError, r"coefficients: expected shape \(4,\), got \(1,\)"),
]


@pytest.mark.parametrize(("function", "changes", "error", "message"), MISTAKES)
def test_mistakes_name_the_argument_what_came_and_what_was_wanted(function, changes, error, message):
    function()
    with pytest.raises(error, match=message):
        function(**changes)


def test_philox_normal_refuses_other_dtypes():
    with pytest.raises(TypeError, match=r"dtype: expected one of float32.*got torch.int32"):
        philox_normal((2,), INDEX, **NOISE, dtype=torch.int32)


@pytest.mark.parametrize("function", [noise, loss, euler, dpmpp])
def test_triton_never_falls_back(function, monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    with pytest.raises(RuntimeError, match=r"impl='triton' of .* cannot run: it needs CUDA tensors, got cpu"):
        function(impl="triton")
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="cannot run: the triton package is not installed; use impl='eager'"):
        function(impl="triton")


def test_the_operators_positions_are_named_in_its_schemas_order():
    arguments = [argument.name for argument in ops.group_loss._schema.arguments]
    assert arguments == list(ops.GroupLossInputs._fields)
    assert len(ops.group_loss._schema.returns) == len(ops.GroupLossResults._fields)


def test_auto_says_once_what_it_chose(caplog):
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="dgpo_kernels"):
        noise()
        noise()
    said = [record.message.split(" (")[0] for record in caplog.records]
    assert said == ["group_noise on cpu: impl='auto' chose 'eager'"]


def test_without_triton_everything_but_triton_works():
    """In a fresh process where triton cannot be imported, training runs and impl="triton" says what is missing."""
    program = """
import sys
sys.modules["triton"] = None
import torch, dgpo_kernels
index = torch.tensor([0, 0])
policy = torch.nn.Parameter(torch.randn(2, 4))
optimizer = torch.optim.SGD([policy], lr=1.0)
before = policy.detach().clone()
x_t = dgpo_kernels.group_noise(torch.randn(2, 4), torch.rand(2), index, seed=0, draw=0)
arguments = (policy, before, x_t, torch.tensor([1.0, -1.0]), index)
dgpo_kernels.dgpo_loss(*arguments, seed=0, draw=0, beta=1.0).loss.backward()
optimizer.step()
assert not torch.equal(policy, before)
try:
    dgpo_kernels.dgpo_loss(*arguments, seed=0, draw=0, beta=1.0, impl="triton")
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "impl='triton' of dgpo_loss cannot run: the triton package is not installed; use impl='eager' or 'compile'\n"
    )


def test_solver_steps_are_their_formulas():
    x, cond, uncond, prev = torch.randn(4, 2, 3, dtype=torch.float64)
    v = uncond + 4.5 * (cond - uncond)
    step = guided_euler_step(x, cond, uncond, guidance_scale=4.5, coefficients=torch.tensor([-0.25]))
    torch.testing.assert_close(step, x - 0.25 * v)
    coefficients = torch.tensor([0.5, 0.75, 0.375, -0.125])
    x_next, x0 = guided_dpmpp_2m_step(x, cond, uncond, prev, guidance_scale=4.5, coefficients=coefficients)
    torch.testing.assert_close(x0, x - 0.5 * v)
    torch.testing.assert_close(x_next, 0.75 * x + 0.375 * x0 - 0.125 * prev)
    x_next, x0 = guided_dpmpp_2m_step(x, cond, None, None, guidance_scale=4.5, coefficients=coefficients)
    torch.testing.assert_close(x0, x - 0.5 * cond)
    torch.testing.assert_close(x_next, 0.75 * x + 0.375 * x0)
