"""The optimizer of a run: AdamW with states in fp32 or in 8 bits, on weights in fp32 or in bf16."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgpo_fast.config.options import Optimizer as OptimizerConfig
from dgpo_fast.errors import UserError
from dgpo_fast.learning.rounding import Rounding, SplitMaster, StochasticRounding, join_fp32, split_fp32

CHUNK_NUMEL = 64 * 2**20
"""bf16 weights stepped at once: their fp32 values take 256 MiB."""
EIGHT_BIT_BLOCK = 256
EIGHT_BIT_FROM_NUMEL = 4096
"""bitsandbytes: elements that share a scale, and the size below which a weight's states stay in fp32."""
QUANTILE_MAPS = ("qmap1", "qmap2")
"""bitsandbytes: which number each of the 256 codes stands for, the same tensors for all weights."""
ROUNDING, SHARED = "rounding", "shared"


class Bf16Optimizer:
    """Steps an optimizer in fp32 on weights that live in bf16.

    A chunk of weights at a time is widened to fp32, stepped, and rounded back into the same memory. Gradients and
    states are in the optimizer's own precision throughout.

    Args:
        inner: the optimizer; its parameters are the bf16 weights.
        rounding: how fp32 values become bf16 weights.
    """

    def __init__(self, inner: torch.optim.Optimizer, rounding: Rounding):
        self.inner = inner
        self.rounding = rounding
        self.steps = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """One step of every weight that has a gradient."""
        gradients = {index: weight.grad for index, weight in enumerate(_parameters(self.inner))}
        for weight in _parameters(self.inner):
            weight.grad = None
        for chunk in _chunks(self.inner):
            self._step_chunk({i: weight for i, weight in chunk.items() if gradients[i] is not None}, gradients)
        self.steps += 1

    def _step_chunk(self, chunk: dict[int, nn.Parameter], gradients: dict[int, Tensor | None]) -> None:
        kept = {index: weight.data for index, weight in chunk.items()}
        try:
            for index, weight in chunk.items():
                weight.data = self.rounding.widen(index, weight.data)
                weight.grad = gradients.pop(index).float()  # type: ignore[union-attr]
            self.inner.step()
            for index, weight in chunk.items():
                self.rounding.narrow(index, weight.data, kept[index], self.steps)
        finally:
            for index, weight in chunk.items():
                weight.grad, weight.data = None, kept[index]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self.inner.zero_grad(set_to_none=set_to_none)


AnyOptimizer = torch.optim.Optimizer | Bf16Optimizer


def make_optimizer(
    weights: Mapping[str, nn.Parameter], config: OptimizerConfig, storage: str = "fp32", seed: int = 0
) -> AnyOptimizer:
    """AdamW over `weights`.

    Args:
        weights: the trained tensors.
        config: which AdamW, and its numbers.
        storage: how the weights are kept, see `policy.weight_storage`.
        seed: of stochastic rounding.

    Raises UserError for an 8-bit optimizer if bitsandbytes is not installed or does not support this device.
    """
    inner = _adamw(list(weights.values()), config)
    if storage == "fp32":
        return inner
    return Bf16Optimizer(inner, SplitMaster() if storage == "bf16_master" else StochasticRounding(seed))


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    on_gpu = parameters[0].device.type == "cuda"
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=on_gpu, **options)
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            f"optimizer.name {config.name} needs the package bitsandbytes: pip install bitsandbytes"
        ) from None
    if config.name == "paged_adamw8bit":
        if not on_gpu:
            raise UserError("optimizer.name paged_adamw8bit moves states between a GPU and the CPU; here use adamw8bit")
        return bitsandbytes.optim.PagedAdamW8bit(parameters, **options)
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


def state_bytes(numel: int, name: str) -> int:
    """Bytes of both moments of a weight with `numel` elements under `optimizer.name`."""
    if name == "adamw" or numel < EIGHT_BIT_FROM_NUMEL:
        return 8 * numel
    return 2 * (numel + 4 * -(-numel // EIGHT_BIT_BLOCK))


def optimizer_tensors(optimizer: AnyOptimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, by the position of the weight and the state's name."""
    tensors = {}
    inner = optimizer.inner if isinstance(optimizer, Bf16Optimizer) else optimizer
    for index, weight in enumerate(_parameters(inner)):
        for name, value in inner.state.get(weight, {}).items():
            owner = SHARED if name in QUANTILE_MAPS else index
            tensors[f"{owner}/{name}"] = torch.as_tensor(value)
    if isinstance(optimizer, Bf16Optimizer):
        tensors[f"{ROUNDING}/steps"] = torch.tensor(optimizer.steps)
        tensors |= {f"{ROUNDING}/{name}": tensor for name, tensor in optimizer.rounding.tensors().items()}
    return tensors


@torch.no_grad()
def load_optimizer(optimizer: AnyOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts `optimizer_tensors` back; hyper-parameters stay those of `optimizer`."""
    slots: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, slot = name.split("/", 1)
        slots.setdefault(owner, {})[slot] = tensor
    kept = slots.pop(ROUNDING, {})
    inner = optimizer.inner if isinstance(optimizer, Bf16Optimizer) else optimizer
    device = next(_parameters(inner)).device
    maps = {name: tensor.to(device) for name, tensor in slots.pop(SHARED, {}).items()}
    for index, weight in enumerate(_parameters(inner)):
        if str(index) in slots:
            state = _state(inner, weight, slots[str(index)])
            inner.state[weight] = state | maps if "absmax1" in state else state
    if isinstance(optimizer, Bf16Optimizer):
        optimizer.steps = int(kept.pop("steps", 0))  # none in the checkpoint of a run that was in fp32
        optimizer.rounding.load(kept, device)


def in_storage(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], storage: str
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """A checkpoint's weights and optimizer state for a run that keeps its weights otherwise, to the last bit.

    Args:
        weights: in bf16 or in fp32, by name in the order of the optimizer's positions.
        optimizer: of `optimizer_tensors`.
        storage: of the run, see `policy.weight_storage`.
    """
    was_bf16 = next(iter(weights.values())).dtype == torch.bfloat16
    if was_bf16 == (storage != "fp32") or storage == "bf16_stochastic":
        return weights, optimizer
    halves = [f"{ROUNDING}/{index}" for index in range(len(weights))]
    if was_bf16:
        lower = (optimizer.get(name) for name in halves)  # none before the first step
        pairs = zip(weights.items(), lower, strict=True)
        whole = {name: high.float() if low is None else join_fp32(high, low) for (name, high), low in pairs}
        return whole, {name: tensor for name, tensor in optimizer.items() if name not in halves}
    split = [split_fp32(weight) for weight in weights.values()]
    upper = {name: high for name, (high, _) in zip(weights, split, strict=True)}
    return upper, {**optimizer, **{half: low for half, (_, low) in zip(halves, split, strict=True)}}


def _state(optimizer: torch.optim.Optimizer, weight: nn.Parameter, slots: Mapping[str, Tensor]) -> dict[str, Any]:
    """One weight's state. Not by `load_state_dict`: torch's would cast fp32 states to the weight's dtype, and that of
    bitsandbytes would take paged states out of their pages."""
    state: dict[str, Any] = {}
    eight_bit = hasattr(optimizer, "get_state_buffer")
    for name, tensor in slots.items():
        if name == "step" and eight_bit:
            state[name] = int(tensor)
        elif name == "step":
            state[name] = tensor.to(weight.device) if optimizer.defaults.get("fused") else tensor
        elif name in ("state1", "state2"):
            state[name] = optimizer.get_state_buffer(weight, dtype=tensor.dtype)  # type: ignore[attr-defined]
            state[name].copy_(tensor)
        else:
            state[name] = tensor.to(weight.device)
    return state


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (weight for group in optimizer.param_groups for weight in group["params"])


def _chunks(optimizer: torch.optim.Optimizer) -> Iterator[dict[int, nn.Parameter]]:
    chunk: dict[int, nn.Parameter] = {}
    numel = 0
    for index, weight in enumerate(_parameters(optimizer)):
        if chunk and numel + weight.numel() > CHUNK_NUMEL:
            yield chunk
            chunk, numel = {}, 0
        chunk[index] = weight
        numel += weight.numel()
    yield chunk
