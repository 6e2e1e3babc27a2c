"""Bytes of forward and backward passes in addition to weights, counted by running them on the meta device.

Only one transformer block of each kind is run: blocks of a kind save the same, so the model's whole depth is the sum.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dgpo_fast.config.options import Policy as PolicyConfig
from dgpo_fast.engine.checkpointing import checkpoint_blocks
from dgpo_fast.memory.live import LiveBytes
from dgpo_fast.models.family import Family
from dgpo_fast.models.merged_lora import use_merged_weights
from dgpo_fast.models.meta import FusedAttention, SampleShape
from dgpo_fast.models.policy import with_lora
from dgpo_fast.models.quantised import SAME, quantise_blocks

Counted = TypeVar("Counted")


@dataclass(frozen=True)
class Trained:
    """What of the policy is trained.

    Attributes:
        storage: how its weights are kept, see `policy.weight_storage`.
        lora: rank and targets of the adapters; None if all weights are trained.
        checkpointing: as `engine.checkpointing`.
        merged: whether the policy computes with merged weights, see `policy.is_merged`.
        base_precision: as `policy.base_precision`.
    """

    storage: str
    lora: tuple[int, tuple[str, ...]] | None
    checkpointing: str = "none"
    merged: bool = False
    base_precision: str = SAME


@dataclass(frozen=True)
class Activations:
    """Bytes of a forward and backward of `batch` samples beside weights and gradients.

    Attributes:
        saved: held between forward and backward.
        peak: most at once, `saved` included.
    """

    saved: int
    peak: int


class MixedPrecision(TorchFunctionMode):
    """Emulates autocast to bf16 for the operations of these models, since the meta device has no autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.cast: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            args = tuple(self._to_bf16(value) for value in args)
            kwargs = {name: self._to_bf16(value) for name, value in (kwargs or {}).items()}
        elif func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))

    def _to_bf16(self, value: object) -> object:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if isinstance(value, nn.Parameter):
            return self.cast.setdefault(id(value), value.bfloat16())  # autocast casts a weight once a forward
        return value.bfloat16()


class Simulation:
    """A run's forward and backward passes without data. Made and cached by `simulation`.

    Args:
        family: of the model.
        trained: what of the policy is trained, and how it is kept.
        dtype: of the run.
        shape: of one sample.
    """

    def __init__(self, family: Family, trained: Trained, dtype: torch.dtype, shape: SampleShape):
        small, self.counts = family.one_of_each_block()
        self.family, self.dtype, self.shape = family, dtype, shape
        self.known: dict[tuple, Any] = {}  # bytes, or `Activations`
        with torch.device("meta"):
            self.base = family.build_transformer(small).requires_grad_(False)
            self.policy = family.build_transformer(small).requires_grad_(trained.lora is None)
            self.vae = family.build_vae().requires_grad_(False)
        for module in (self.base, self.policy, self.vae):
            nn.Module.to(module, dtype)
        if trained.base_precision != SAME:
            for transformer in (self.base, self.policy):
                quantise_blocks(transformer, trained.base_precision, "meta")
        if trained.lora is not None:
            with_lora(self.policy, PolicyConfig(lora_rank=trained.lora[0], lora_targets=trained.lora[1]), seed=0)
        self.adapted = copy.deepcopy(self.policy) if trained.merged else self.policy
        if trained.merged:
            use_merged_weights(self.policy)
        if trained.checkpointing != "none":
            checkpoint_blocks(self.policy, trained.checkpointing, again=lambda: modes(self.mixed))
        self.mixed = dtype == torch.bfloat16 and trained.storage == "fp32"
        for parameter in self.policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32 if trained.storage == "fp32" else torch.bfloat16)
                parameter.grad_dtype = torch.float32
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)

    def forward(self, batch: int, *, policy: bool = False) -> int:
        """Peak of a forward without a gradient, of the base or with the policy's adapters."""
        return self._once(("forward", batch, policy), lambda: self._forward(batch, policy))

    def training(self, batch: int) -> Activations:
        """The policy's forward with its backward."""
        return self._once(("training", batch), lambda: self._training(batch))

    def decoding(self, batch: int) -> int:
        """Peak of decoding latents to pixels."""
        return self._once(("decoding", batch), lambda: self._decoding(batch))

    def _once(self, key: tuple, count: Callable[[], Counted]) -> Counted:
        if key not in self.known:
            self.known[key] = count()
        return self.known[key]

    def _forward(self, batch: int, policy: bool) -> int:
        module = self.adapted if policy else self.base
        with self._counting(module) as live, torch.no_grad():
            start = live.now
            self.shape.predict(module, batch, self.dtype)
        return live.peak - start

    def _training(self, batch: int) -> Activations:
        saved_by_block: list[int] = []
        with self._counting(self.policy) as live:
            hooks = [_on_block(block, live, saved_by_block) for block in self.family.blocks(self.policy)]
            start = live.now
            out = self.shape.predict(self.policy, batch, self.dtype)
            shallow_saved = live.now - start
            out.backward(torch.empty_like(out))
            for handle in chain.from_iterable(hooks):
                handle.remove()
        deeper = sum((count - 1) * saved for count, saved in zip(self.counts, saved_by_block, strict=True))
        return Activations(shallow_saved + deeper, live.peak - start + deeper)

    def _decoding(self, batch: int) -> int:
        with self._counting(self.vae) as live, torch.no_grad():
            start = live.now
            self.family.decode(self.vae, self.shape.latents(batch, torch.float32))
        return live.peak - start

    def _counting(self, module: nn.Module) -> "_Counting":
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        return _Counting([*module.parameters(), *module.buffers(), *gradients], self.mixed and module is self.policy)


@contextmanager
def modes(mixed: bool) -> Iterator[None]:
    """Makes the meta device do what a real one does."""
    with FusedAttention(_attention), MixedPrecision() if mixed else nullcontext():
        yield


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)  # what is added to the scores, and saved for the backward
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)


class _Counting:
    """`LiveBytes` beside the modes that make the meta device do what a real one does."""

    def __init__(self, existing: Sequence[Tensor], mixed: bool):
        self.existing, self.mixed = existing, mixed

    def __enter__(self) -> LiveBytes:
        self.stack = ExitStack()
        live = self.stack.enter_context(LiveBytes(self.existing))
        self.stack.enter_context(modes(self.mixed))
        return live

    def __exit__(self, *error: object) -> None:
        self.stack.close()


@dataclass(frozen=True)
class _Model:
    """A family's model, by what its files say."""

    family: Family = field(compare=False)
    kind: type
    configurations: str


@cache
def _simulation(model: _Model, trained: Trained, dtype: torch.dtype, shape: SampleShape) -> Simulation:
    return Simulation(model.family, trained, dtype, shape)


def simulation(family: Family, trained: Trained, dtype: torch.dtype, shape: SampleShape) -> Simulation:
    """The simulation of these settings, made once for all models of the same sizes."""
    made_of = family.architecture
    configurations = json.dumps([dict(made_of.transformer), dict(made_of.vae)], default=str)
    return _simulation(_Model(family, type(family), configurations), trained, dtype, shape)


def _on_block(block: nn.Module, live: LiveBytes, saved: list[int]) -> list[RemovableHandle]:
    before: list[int] = []
    return [
        block.register_forward_pre_hook(lambda *_: before.append(live.now)),
        block.register_forward_hook(lambda *_: saved.append(live.now - before.pop())),
    ]
