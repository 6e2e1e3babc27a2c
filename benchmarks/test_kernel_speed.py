"""Speed of the kernels: ``pytest benchmarks/test_kernel_speed.py --benchmark-only --benchmark-json=FILE``.

On a GPU each case is captured in a CUDA graph and timed with CUDA events, the L2 cache filled with other data before
each replay, so that GPU time is compared and not the host's; what a replay of next to nothing takes is kept beside it
(``floor_us``). pytest-benchmark's own figures are the plain, synchronised calls.
Without a GPU those figures are all there is, at smaller sizes. Data is random, and the copy bandwidth is measured in
the same session.

``eager, stored noise`` is the usual way: one ``torch.randn`` a group, gathered, and the formula in eager PyTorch.
``eager`` and ``compile`` draw the same Philox noise as the kernels.
"""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import dgpo_kernels
import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
import torch.utils.benchmark
from dgpo_kernels import reference
from torch import Tensor

# The backward pass alone is timed by repeating it on one graph.
torch._functorch.config.donated_buffer = False
# Each size is compiled for itself, as in a run, whose sizes never change.
torch._dynamo.config.automatic_dynamic_shapes = False
torch._dynamo.config.recompile_limit = 64

GPU = torch.cuda.is_available()
STREAM = torch.cuda.Stream() if GPU else None
"""Everything that is captured is computed on it, the forward pass of a captured backward pass too: autograd goes back
to the stream of the forward pass, and a capture on another one would end there."""
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16
GROUP_SIZE = 4 if not GPU else 24
LATENT = (16, 64, 64)
SMALL = (256, (12, 8, 8))
SIZES = [(batch, LATENT) for batch in ((24, 48, 96, 192) if GPU else (4, 8))] + [SMALL]
IMPLEMENTATIONS = ["eager, stored noise", "eager", "compile", "triton"]
# For each latent element, the bytes moved and the formula's floating-point operations, noise not counted.
COSTS = {
    "group noise": (2 * 2, 3),
    "loss forward": (4 * 2, 15),
    "loss backward": (4 * 2, 7),
    "loss both": (8 * 2, 22),
    "guided DPM-Solver++(2M)": (4 * 4 + 2 * 2, 10),
}


@contextlib.contextmanager
def on_stream() -> Iterator[None]:
    """On `STREAM`, after everything before and before everything after; without a GPU, as it is."""
    if not GPU:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(STREAM):
        yield
    torch.cuda.synchronize()


def gpu_times_us(function: Callable[[], Any]) -> list[float]:
    """Microseconds of 50 replays of the captured function, each with a cold L2 cache."""
    with on_stream():
        for _ in range(3):
            function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=STREAM):
        function()
    other = torch.ones(128 << 20, device="cuda")
    times = []
    for _ in range(50):
        other.amax()  # reads alone: what it wrote would be written back at the cost of what is timed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return times


def peak_mib(function: Callable[[], Any]) -> float:
    """Memory that one call takes beyond its inputs, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@pytest.fixture(scope="session")
def copy_gb_per_s() -> float:
    """Bytes read and written by a device-to-device copy, far beyond any cache, per nanosecond."""
    source = torch.randn((2 << 30 if GPU else 256 << 20) // 4, device=DEVICE)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * 4
    if GPU:
        times = sorted(gpu_times_us(lambda: target.copy_(source)))
        return moved / times[len(times) // 2] / 1000
    timer = torch.utils.benchmark.Timer("target.copy_(source)", globals={"target": target, "source": source})
    return moved / timer.timeit(10).median / 1e9


@pytest.fixture(scope="session")
def floor_us() -> float | None:
    """What the smallest replay takes on a GPU, events included."""
    if not GPU:
        return None
    one = torch.ones((), device=DEVICE)
    times = sorted(gpu_times_us(lambda: one.add_(1)))
    return times[len(times) // 2]


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    versions = {}
    for package in ("torch", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), **versions}


def stored_noise(shape: tuple[int, ...], index: Tensor) -> Tensor:
    """One draw a group, gathered to its samples, as training scripts do."""
    return torch.randn(index.shape[0] // GROUP_SIZE, *shape, device=DEVICE)[index]


def group_noise_case(impl: str, batch: int, shape: tuple[int, ...]) -> Callable[[], Any]:
    x0 = torch.randn(batch, *shape, device=DEVICE).to(DTYPE)
    sigma = torch.rand(batch, device=DEVICE)
    index = torch.arange(batch, device=DEVICE) // GROUP_SIZE % max(batch // GROUP_SIZE, 1)
    seed, draw = torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE)
    if impl == "eager, stored noise":
        level = sigma.view(-1, *[1] * len(shape))
        return lambda: ((1 - level) * x0.float() + level * stored_noise(shape, index)).to(DTYPE)
    return lambda: dgpo_kernels.group_noise(x0, sigma, index, seed=seed, draw=draw, impl=impl)


def loss_case(impl: str, batch: int, shape: tuple[int, ...], part: str) -> Callable[[], Any]:
    policy, ref, old, x0 = torch.randn(4, batch, *shape, device=DEVICE).to(DTYPE).unbind()
    policy = policy.clone().requires_grad_()
    advantage = torch.randn(batch, device=DEVICE)
    index = torch.arange(batch, device=DEVICE) // GROUP_SIZE % max(batch // GROUP_SIZE, 1)
    seed, draw = torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE)

    def stored() -> Tensor:
        target = stored_noise(shape, index) - x0.float()
        dsm = [(v.float() - target).square().flatten(1).mean(1) for v in (policy, ref, old)]
        kl = (policy.float() - ref.float()).square().flatten(1).mean(1)
        losses = reference.SampleLosses(*dsm, kl)
        score = reference.group_scores(losses, advantage, index, 100.0, None)
        return reference.loss_from_scores(losses, score, advantage, index, 100.0, 1e-2, 0.02, None, None)[0]

    def fused() -> Tensor:
        return dgpo_kernels.dgpo_loss(
            policy,
            ref,
            x0,
            advantage,
            index,
            seed=seed,
            draw=draw,
            beta=100.0,
            old_v=old,
            clip_range=1e-2,
            kl_v=ref,
            kl_weight=0.02,
            impl=impl,
        ).loss

    forward = stored if impl == "eager, stored noise" else fused
    if part == "forward":
        return forward
    if part == "both":
        return lambda: torch.autograd.grad(forward(), policy)
    with on_stream():
        loss = forward()
    return lambda: torch.autograd.grad(loss, policy, retain_graph=True)


def step_case(impl: str, batch: int, shape: tuple[int, ...]) -> Callable[[], Any]:
    x, prev = torch.randn(2, batch, *shape, device=DEVICE).unbind()
    cond, uncond = torch.randn(2, batch, *shape, device=DEVICE).to(DTYPE).unbind()
    coefficients = torch.tensor([0.8, 0.6, 0.5, -0.1], device=DEVICE)
    options = {"guidance_scale": 4.5, "coefficients": coefficients}
    return lambda: dgpo_kernels.guided_dpmpp_2m_step(x, cond, uncond, prev, **options, impl=impl)


def make_case(op: str, impl: str, batch: int, shape: tuple[int, ...]) -> Callable[[], Any]:
    if op == "group noise":
        return group_noise_case(impl, batch, shape)
    if op.startswith("loss"):
        return loss_case(impl, batch, shape, op.removeprefix("loss "))
    return step_case(impl, batch, shape)


@pytest.mark.parametrize(("batch", "shape"), SIZES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", COSTS)
def test_speed(op, impl, batch, shape, benchmark, copy_gb_per_s, floor_us):
    if impl == "triton" and not GPU:
        pytest.skip("Triton's kernels need a GPU: not measured")
    if impl == "eager, stored noise" and op.startswith("guided"):
        pytest.skip("the step has no noise: the same as eager")
    torch.manual_seed(0)
    function = make_case(op, impl, batch, shape)
    function()
    elements = batch * torch.Size(shape).numel()
    bytes_each, flops_each = COSTS[op]
    benchmark.extra_info |= {
        **machine(),
        "op": op,
        "impl": impl,
        "batch": batch,
        "elements": elements,
        "bytes": elements * bytes_each,
        "flops": elements * flops_each,
        "copy_gb_per_s": copy_gb_per_s,
    }

    def call() -> None:
        function()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20 if GPU else 7, warmup_rounds=2)
    if GPU:
        times = sorted(gpu_times_us(function))
        quantiles = {f"gpu_us_{percent}": times[len(times) * percent // 100] for percent in (20, 50, 80)}
        benchmark.extra_info |= {**quantiles, "floor_us": floor_us, "peak_mib": peak_mib(function)}
