"""The attention kernel that is fastest at the run's own shapes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from torch import Tensor
from torch.nn import functional as F

from dgpo_fast.engine.compile import BACKEND, RECOMPILE_LIMIT, REFUSALS, reason
from dgpo_fast.engine.remembered import remembered
from dgpo_fast.engine.timing import Spread, best_ms
from dgpo_fast.models.attention import DISPATCHED, MATMUL, attend
from dgpo_fast.models.family import AttentionShape

# Written-out products keep S × S numbers a head, which only pays for a few tokens on a CPU.
CANDIDATES = {"cpu": ("native", MATMUL), "cuda": tuple(DISPATCHED)}
FASTER_BY = 1.1
SAFE_CUDNN, CUDNN_TOKENS = 91501, 128
"""Before this version, cuDNN's attention may read out of bounds at token counts that are no multiple of 128."""
TIMED_IN_BLOCKS = ("cuda",)
"""Devices on which kernels are timed in the compiled operations around them, if blocks are compiled."""
TIMED_S = {"cpu": 0.2, "cuda": 1.0}
# Makes whole graphs of forward and backward as the compiler does, and no code of them.
TRACER = "aot_eager"


@dataclass(frozen=True)
class Timing:
    """What one kernel takes for all attention of a forward.

    Attributes:
        name: as `engine.attention` has it.
        forward_ms: without gradients; None if it cannot run.
        backward_ms: forward and backward; None if it cannot run or has no gradient.
        obstacle: why not, in a few words.
    """

    name: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    obstacle: str = ""


def candidates(device: torch.device, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The kernels to try on `device`, of those that a model's attention can be switched to; None: of all."""
    return tuple(name for name in CANDIDATES[device.type] if names is None or name in names)


def timings(
    shapes: tuple[AttentionShape, ...],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    names: Sequence[str] | None = None,
) -> tuple[Timing, ...]:
    """`time_attention`, measured once on this machine."""
    tried = candidates(device, names)
    what = {
        "attention": [asdict(shape) for shape in shapes],
        "device": device_name(device),
        "dtype": str(dtype),
        "compiled": compiled,
        "kernels": {name: obstacle(name, device, dtype, shapes) for name in tried},
    }
    return tuple(
        Timing(**timing)
        for timing in remembered(
            what,
            lambda spread: [
                asdict(timing) for timing in time_attention(shapes, device, dtype, compiled, spread, names)
            ],
        )
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def time_attention(
    shapes: tuple[AttentionShape, ...],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    spread: Spread | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Timing, ...]:
    """All kernels of this device, or those of them in `names`, at `shapes`; those that cannot run say why.

    It takes about a second on a GPU.

    If blocks will be `compiled`, kernels that no whole graph holds cannot run.
    """
    obstacles = {name: obstacle(name, device, dtype, shapes) for name in candidates(device, names)}
    in_blocks = compiled and device.type in TIMED_IN_BLOCKS
    trials = {name: [] for name, why in obstacles.items() if not why}  # type: dict[str, list[_Trial]]
    tensors = [_tensors(shape, device, dtype) for shape in shapes]
    for name in list(trials):
        try:
            trials[name] = [_trial(name, of_shape, in_blocks) for of_shape in tensors]
            obstacles[name] = graph_obstacle(name, shapes[0], device, dtype) if compiled else ""
        except REFUSALS as error:
            obstacles[name] = reason(error)
        if obstacles[name]:
            del trials[name]
    total_ms = partial(_total_ms, shapes=shapes, device=device, spread=spread)
    forward = total_ms({name: [trial.forward for trial in group] for name, group in trials.items()})
    trained = {name: group for name, group in trials.items() if all(trial.differentiable for trial in group)}
    backward = total_ms({name: [trial.backward for trial in group] for name, group in trained.items()})
    return tuple(
        Timing(name, forward.get(name), backward.get(name), why or ("" if name in backward else "has no gradient"))
        for name, why in obstacles.items()
    )


def fastest(timings: Sequence[Timing], *, training: bool) -> str:
    """The kernel to take: torch's own unless another one is clearly faster."""
    times = {t.name: t.backward_ms if training else t.forward_ms for t in timings}
    known = {name: time for name, time in times.items() if time is not None}
    best = min(known, key=known.__getitem__, default="native")
    return best if best in known and known[best] * FASTER_BY < known.get("native", float("inf")) else "native"


def obstacle(name: str, device: torch.device, dtype: torch.dtype, shapes: Sequence[AttentionShape]) -> str:
    """Why the kernel `name` cannot run at `shapes` here, in a few words; empty if it can."""
    if name == MATMUL:
        return "" if dtype in (torch.float32, torch.float64) else "would round its logits: only for fp32"
    if name != "native" and device.type != "cuda":
        return "needs a CUDA GPU"
    if name != "native" and dtype == torch.float32 and name != "xformers":
        return "needs bf16"
    uneven = next((shape.tokens for shape in shapes if shape.tokens % CUDNN_TOKENS), None)
    version = torch.backends.cudnn.version() or 0
    if name == "native_cudnn" and uneven is not None and version < SAFE_CUDNN:
        return f"cuDNN {version} may read out of bounds at {uneven} tokens, no multiple of {CUDNN_TOKENS}"
    try:
        _check_attention_backend_requirements(DISPATCHED[name])
    except RuntimeError as error:
        return str(error).split(". ")[0]
    return ""


def graph_obstacle(
    name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype, whole: bool = False
) -> str:
    """Why the kernel `name` cannot be part of a compiled block, in a few words; empty if it can.

    With `whole` it is compiled as a block is and run forward and backward at `shape`, else only traced.
    """
    backend, size = DISPATCHED.get(name), (shape.batch if whole else 1, shape.tokens, shape.heads, shape.head_dim)
    inputs = [torch.zeros(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    by = BACKEND if whole else TRACER
    compiled = torch.compile(partial(attend, backend), fullgraph=True, dynamic=False, backend=by)
    try:
        # The kernels share one function, whose graphs are counted together.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            attended = compiled(*inputs)
            if whole and attended.requires_grad:
                attended.sum().backward()
            _finish(device)
    except REFUSALS as error:
        return f"cannot be compiled: {reason(error)}"
    return ""


@dataclass(frozen=True)
class _Trial:
    """Calls of one kernel at one shape."""

    forward: Callable[[], object]
    backward: Callable[[], object]
    differentiable: bool


@dataclass(frozen=True)
class _Tensors:
    """Random numbers of one shape that all kernels are tried on: together they would take most of a small card."""

    inputs: list[Tensor]
    leaves: list[Tensor]
    gradient: Tensor
    images: int


def _tensors(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> _Tensors:
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    *inputs, gradient = (torch.randn(size, device=device, generator=generator).to(dtype) for _ in range(4))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return _Tensors(inputs, leaves, gradient, images=shape.tokens - shape.text)


def _trial(name: str, of: _Tensors, in_block: bool) -> _Trial:
    """The kernel's calls, each made once and checked against float64, gradients too.

    With `in_block` the calls are those of a compiled block's attention, in which copies around the kernel are fused
    with others or gone. Raises one of `REFUSALS` if it cannot do them, ValueError if it computes something else.
    """
    backend = DISPATCHED.get(name)
    exact = _sample(None, of, torch.float64)
    plain, found = (_sample(chosen, of, of.gradient.dtype) for chosen in (DISPATCHED["native"], backend))
    eps = torch.finfo(of.gradient.dtype).eps
    for value, same, oracle in zip(found, plain, exact, strict=False):
        error, allowed = ((tensor.double() - oracle).abs().max() for tensor in (value, same))
        if not error <= 2 * (allowed + eps * oracle.abs().max()):
            raise ValueError(f"computes different values (by up to {float(error):.2g})")
    if not in_block:
        return _tried(lambda *inputs: (attend(backend, *inputs),), of, (of.gradient,))
    run = torch.compile(partial(_block, backend, of.images), fullgraph=True, dynamic=False, backend=BACKEND)
    # The kernels share one function, whose graphs are counted together.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _tried(run, of, _apart(of.gradient, of.images))


def _tried(run: Callable[..., tuple[Tensor, ...]], of: _Tensors, gradients: tuple[Tensor, ...]) -> _Trial:
    trial = _Trial(
        forward=torch.no_grad()(lambda: run(*of.inputs)),
        backward=lambda: torch.autograd.grad(run(*of.leaves), of.leaves, gradients),
        differentiable=run(*of.leaves)[0].requires_grad,
    )
    trial.forward()
    if trial.differentiable:
        trial.backward()
    _finish(of.gradient.device)
    return trial


def _sample(backend: AttentionBackendName | None, of: _Tensors, dtype: torch.dtype) -> list[Tensor]:
    """One sample's attention and, of a kernel that has them, the gradients of query, key and value."""
    leaves = [tensor[:1].to(dtype).requires_grad_() for tensor in of.inputs]
    attended = attend(backend, *leaves)
    gradients = torch.autograd.grad(attended, leaves, of.gradient[:1].to(dtype)) if attended.requires_grad else ()
    return [attended.detach(), *gradients]


def _block(
    backend: AttentionBackendName | None, images: int, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Attention as it stands in a block: image and text tokens are normed and joined before it, and apart behind it."""

    def joined(tensor: Tensor) -> Tensor:
        return torch.cat([F.rms_norm(part, part.shape[-1:]) for part in _apart(tensor, images)], dim=1)

    return _apart(attend(backend, joined(query), joined(key), value), images)


def _apart(tensor: Tensor, images: int) -> tuple[Tensor, ...]:
    """The image tokens, and the text tokens if there are any."""
    return (tensor[:, :images], tensor[:, images:]) if images < tensor.shape[1] else (tensor,)


def _finish(device: torch.device) -> None:
    """Waits for a GPU, which tells of some errors only then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _total_ms(
    calls: dict[str, list[Callable[[], object]]],
    shapes: Sequence[AttentionShape],
    device: torch.device,
    spread: Spread | None,
) -> dict[str, float]:
    """Milliseconds for all attention of a forward, by kernel."""
    totals = dict.fromkeys(calls, 0.0)
    for index, shape in enumerate(shapes):
        budget_s = TIMED_S[device.type] / (2 * len(shapes))
        times = best_ms([group[index] for group in calls.values()], device, budget_s, spread)
        for name, milliseconds in zip(calls, times, strict=True):
            totals[name] += milliseconds * shape.calls
    return totals
