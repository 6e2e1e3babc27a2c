"""On a GPU: noise equal to the CPU's, graphs replayed with new draws, no synchronisation, tensors beyond 2³¹ elements.

The tests in ``fused/`` run on the GPU as well, where there is one.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from dgpo_kernels import dgpo_loss, group_noise, guided_dpmpp_2m_step, philox_normal

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"),
]


def loss_inputs(batch: int = 8, shape: tuple[int, ...] = (16, 64, 64), dtype: torch.dtype = torch.bfloat16) -> dict:
    generator = torch.Generator("cuda").manual_seed(0)
    policy, ref, x0, old = torch.randn(4, batch, *shape, device="cuda", generator=generator).to(dtype)
    return {
        "policy_v": policy.requires_grad_(),
        "ref_v": ref,
        "x0": x0,
        "old_v": old,
        "kl_v": ref,
        "advantage": torch.randn(batch, device="cuda", generator=generator),
        "group_index": torch.arange(batch, device="cuda") // 4,
        "beta": 100.0,
        "clip_range": 1e-2,
        "kl_weight": 0.1,
    }


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_noise_is_the_cpus(impl):
    groups = torch.tensor([0, 0, 7, -(2**40)])
    for shape in ((16, 64, 64), (1031,), (1,)):
        cpu = philox_normal(shape, groups, seed=-7, draw=2**32 - 1)
        gpu = philox_normal(shape, groups.cuda(), seed=-7, draw=2**32 - 1, impl=impl)
        # The chip's square root is one unit in the last place off: up to 1.2e-6 where a normal is above 4.
        torch.testing.assert_close(gpu.cpu(), cpu, atol=2e-6, rtol=0)


def test_a_captured_graph_draws_anew_at_each_replay():
    case = loss_inputs()
    policy = case.pop("policy_v")
    sigma = torch.rand(8, device="cuda")
    seed, draw = torch.tensor(3, device="cuda"), torch.tensor(0, device="cuda")

    def step():
        x_t = group_noise(case["x0"], sigma, case["group_index"], seed=seed, draw=draw, impl="triton")
        result = dgpo_loss(policy, **case, seed=seed, draw=draw, impl="triton")
        return x_t, result.loss, torch.autograd.grad(result.loss, policy)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for replay in range(100):
        draw.fill_(replay)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True)), replay


def test_no_host_synchronisation():
    case = loss_inputs()
    policy = case["policy_v"]
    x, prev = torch.randn(2, 8, 16, 64, 64, device="cuda")
    coefficients = torch.rand(4, device="cuda")
    sigma = torch.rand(8, device="cuda")

    def step():
        group_noise(case["x0"], sigma, case["group_index"], seed=1, draw=2, impl="triton")
        result = dgpo_loss(**case, seed=1, draw=2, reduce_group_scores=lambda scores: 2 * scores, impl="triton")
        torch.autograd.grad(result.loss, policy)
        result = dgpo_loss(**case, seed=1, draw=2, impl="eager")
        torch.autograd.grad(result.loss, policy)
        guided_dpmpp_2m_step(
            x, case["x0"], case["ref_v"], prev, guidance_scale=4.5, coefficients=coefficients, impl="triton"
        )

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements():
    """One sample alone and a batch together exceed 32-bit offsets; checked at both ends against small pieces."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    numel = 2**31 + 4096
    index = torch.tensor([5], device="cuda")
    zeros, one = torch.zeros(1, numel, dtype=torch.bfloat16, device="cuda"), torch.tensor(1.0, device="cuda")
    x_t = group_noise(zeros, one, index, seed=1, draw=1, impl="triton")
    # Counter 0 makes the elements 0, Q, 2Q and 3Q of a sample of any size.
    first = philox_normal((4,), index, seed=1, draw=1)[0]
    quarter = numel // 4
    torch.testing.assert_close(x_t[0, ::quarter].float(), first, atol=1e-2, rtol=1e-2)
    assert (x_t[0, -(1 << 20) :] != 0).float().mean() > 0.99
    del zeros, x_t
    batch = 2**15 + 1
    data = torch.randn(batch, 65536, dtype=torch.bfloat16, device="cuda")
    index = torch.arange(batch, device="cuda")
    arguments = {"seed": 1, "draw": 1, "impl": "triton"}
    x_t = group_noise(data, torch.tensor(0.5, device="cuda"), index, **arguments)
    assert torch.equal(x_t[-3:], group_noise(data[-3:], torch.tensor(0.5, device="cuda"), index[-3:], **arguments))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = """
import torch, dgpo_kernels
index = torch.tensor([0, 0, 1], device="cuda")
for shape in ((7,), (1031,), (12, 8, 8)):
    policy = torch.randn(3, *shape, device="cuda", requires_grad=True)
    data = policy.detach().bfloat16()
    dgpo_kernels.group_noise(data, torch.rand(3, device="cuda"), index, seed=0, draw=0, impl="triton")
    result = dgpo_kernels.dgpo_loss(policy, data, data, torch.randn(3, device="cuda"), index, seed=0, draw=0, beta=1.0,
        old_v=data, clip_range=0.1, kl_v=data, kl_weight=0.1, impl="triton")
    result.loss.backward()
torch.cuda.synchronize()
"""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True)
    if "Device not supported" in result.stdout + result.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
