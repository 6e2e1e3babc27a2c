"""FLOPs and bytes of a run's forwards and backwards.

FLOPs are a function of shapes, so each kind of work is counted once, by the formulas of torch's flop counter, on the
meta device, where nothing is computed; an iteration's FLOPs are its rows times that. Prompt encoders and reward models
are not counted.

Rows are counted twice. *Useful* are those that the result needs: a row a sample, or one a group at a noise level that
the group's samples share. *Executed* are those that ran: also padding, the second forward of micro-batches below a
group, and what checkpointing computes again. Rates and MFU are of useful FLOPs: saving memory must not look like speed.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dgpo_fast.config.options import Policy as PolicyConfig
from dgpo_fast.models.datasheet import peak_tflops
from dgpo_fast.models.family import family_of
from dgpo_fast.models.forward import Forward, Given, called_around
from dgpo_fast.models.merged_lora import use_merged_weights
from dgpo_fast.models.meta import FusedAttention, SampleShape, flash_attention
from dgpo_fast.models.policy import PolicyModels, with_lora
from dgpo_fast.models.text_embeds import TextEmbeds

ROLLOUT, DECODE, BOTH = "rollout", "decode", "rollout with decode"
REFERENCE, OLD, POLICY, BACKWARD = "reference forward", "old forward", "policy forward", "backward"
RECOMPUTED = "recomputed forward"
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "scaled_mm", "matmul")
PARTS_OF_TRAINING = (REFERENCE, OLD, POLICY, BACKWARD)
FUSED_ATTENTION = FusedAttention(flash_attention)


Checkpoint = Callable[[ModelMixin], None]


@dataclass
class Work:
    """FLOPs and bytes by class of operation: matmul, attention, convolution, other.

    Bytes are those of every operation's inputs and outputs, once each: what unfused execution moves.
    """

    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def total_flops(self) -> int:
        """All classes together."""
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> int:
        """All classes together."""
        return sum(self.bytes.values())


class WorkCounter(TorchDispatchMode):
    """Adds up what the operations under it do."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kind = operation_class(func._schema.name)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.work.flops[kind] += formula(*args, **kwargs, out_val=out)
        if not _moves_nothing(func):
            self.work.bytes[kind] += sum(map(_nbytes, tree_leaves((args, kwargs, out))))
        return out


def operation_class(name: str) -> str:
    """The class of an operation by its name: `aten::addmm` → matmul."""
    name = name.rsplit("::", 1)[-1].lstrip("_")
    if re.search("attention|attn|fmha|sdpa", name):
        return "attention"
    if "conv" in name:
        return "convolution"
    return "matmul" if name in MATMULS or re.search("(^|_)linear(_|$)", name) else "other"


def _moves_nothing(func: OpOverload) -> bool:
    is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
    return is_view or "empty" in func._schema.name


def _nbytes(value: object) -> int:
    # An expanded tensor is read from a storage smaller than itself.
    return min(value.nbytes, value.untyped_storage().nbytes()) if isinstance(value, Tensor) else 0


class ModelWork:
    """Counts a run's kinds of work on copies of its architecture that have no data.

    Args:
        transformer: any of the run's transformers; its family and configuration alone are read.
        policy: what is trained.
        adapted: whether the behaviour weights are an adapter too, and no merged copy.
        checkpoint: checkpoints the blocks of a policy as the run does; None if it does not.
        merged: whether the policy computes with merged weights.
        dtype: of weights and activations; bytes depend on it.
        shape: of one sample.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        policy: PolicyConfig,
        dtype: torch.dtype,
        shape: SampleShape,
        adapted: bool = False,
        checkpoint: Checkpoint | None = None,
        merged: bool = False,
    ):
        self.dtype, self.shape, self.checkpoint = dtype, shape, checkpoint
        self._counted: dict[tuple[str, int], Work] = {}
        self.family, config = family_of(transformer), transformer.config
        family = self.family
        with torch.device("meta"):
            self.base = family.build_transformer(config).requires_grad_(False)
            self.policy = family.build_transformer(config).requires_grad_(policy.train == "full")
            self.vae = family.build_vae().requires_grad_(False)
        if policy.train == "lora":
            with_lora(self.policy, policy, seed=0)
        self.behaviour = copy.deepcopy(self.policy) if adapted else self.base
        if merged:
            use_merged_weights(self.policy)
        for module in (self.base, self.behaviour, self.policy, self.vae):
            torch.nn.Module.to(module, dtype)  # diffusers' own `to` warns of what does not matter without data

    def count(self, kind: str, batch: int = 1) -> Work:
        """One forward, backward or decode of `batch` samples; counted once."""
        if (kind, batch) not in self._counted:
            self._counted[kind, batch] = self._count(kind, batch)
        return self._counted[kind, batch]

    def recomputed_flops(self) -> int:
        """FLOPs of a sample's backward that checkpointing adds."""
        if self.checkpoint is None:
            return 0
        plain = self.count(BACKWARD).total_flops
        blocks = self.family.blocks(self.policy)
        originals = [block.forward for block in blocks]
        self.checkpoint(self.policy)
        checkpointed = self._count(BACKWARD, 1).total_flops
        for block, original in zip(blocks, originals, strict=True):
            block.forward = original
        return checkpointed - plain

    def _count(self, kind: str, batch: int) -> Work:
        if kind == DECODE:
            latents = self.shape.latents(batch, self.dtype)
            return _count(lambda: self.family.decode(self.vae, latents))
        if kind == BACKWARD:
            with FUSED_ATTENTION:
                out = self.shape.predict(self.policy, batch, self.dtype)
            return _count(lambda: out.backward(torch.empty_like(out)))
        transformer = {REFERENCE: self.base, POLICY: self.policy}.get(kind, self.behaviour)
        return _count(lambda: self.shape.predict(transformer, batch, self.dtype))


def _count(action: Callable[[], object]) -> Work:
    with FUSED_ATTENTION, WorkCounter() as counter:
        action()
    return counter.work


class WorkMeter:
    """How many rows an iteration sent through each kind of work, useful and executed, and the FLOP/s that makes.

    Args:
        models: the run's transformers. Their forwards inside `training` are seen.
        policy: what is trained.
        latent: (C, H, W) of a latent.
        frozen_policy: whether the policy's forwards without a gradient are useful; else they find the scores of groups
            that micro-batches cut, once more than needed.
        drawn: the rows of a rollout's batch, padding included, for each of its forwards of a sample.
        checkpoint: as for `ModelWork`.

    Attributes:
        last, last_executed: rows by kind of work of the iteration that ended last.
        batches: rows in one forward, the most seen, by kind of training work.
    """

    def __init__(
        self,
        models: PolicyModels,
        policy: PolicyConfig,
        latent: tuple[int, ...],
        *,
        frozen_policy: bool = True,
        drawn: Callable[[int], int] = int,
        checkpoint: Checkpoint | None = None,
    ):
        self.models, self.policy, self.latent = models, policy, latent
        self.frozen_policy, self.drawn, self.checkpoint = frozen_policy, drawn, checkpoint
        self.peak_tflops = peak_tflops(models.device, models.dtype)
        self.samples: dict[str, int] = defaultdict(int)
        self.executed: dict[str, int] = defaultdict(int)
        self.last: dict[str, int] = {}
        self.last_executed: dict[str, int] = {}
        self.batches: dict[str, int] = {}
        self.flops_per_sample: dict[str, int] = {}
        self.shape: SampleShape | None = None

    def sampled(self, text: TextEmbeds, forwards: int, useful: int) -> None:
        """Counts one batch of a rollout: `text` has a prompt a row, of which the first `useful` are kept."""
        self.shape = SampleShape.of(self.latent, text)
        self.samples[ROLLOUT] += useful * forwards
        self.executed[ROLLOUT] += self.drawn(len(text)) * forwards

    def decoded(self, images: int) -> None:
        """Counts decoded images; the decoder's own padding is not counted."""
        self.samples[DECODE] += images
        self.executed[DECODE] += images

    @contextmanager
    def training(self) -> Iterator[None]:
        """Counts the forward and backward passes of the block."""
        named = ((REFERENCE, self.models.base), (OLD, self.models.behaviour), (POLICY, self.models.policy))
        with ExitStack() as stack:
            for kind, module in named:
                # Outside of the engine's padding of a partial batch, and inside of it.
                useful, executed = (
                    partial(self._counted, self._on_forward, kind),
                    partial(self._counted, self._on_execution, kind),
                )
                stack.enter_context(called_around(module, useful))
                stack.enter_context(called_around(module, executed, innermost=True))
            yield

    def take(self) -> dict[str, int]:
        """Useful rows by kind of work since the last call; those executed are in `last_executed`."""
        taken, self.samples = dict(self.samples), defaultdict(int)
        self.last_executed, self.executed = dict(self.executed), defaultdict(int)
        return taken

    def rates(self, seconds: float) -> dict[str, float]:
        """Rates of the iteration that ends now and took `seconds`, for `metrics.jsonl`."""
        self.last = self.take()
        rate, executed = (self.flops(rows) / seconds / 1e12 for rows in (self.last, self.last_executed))
        rates = {"achieved_tflops": rate, "executed_tflops": executed}
        return rates | {"mfu_percent": 100 * rate / self.peak_tflops} if self.peak_tflops else rates

    def flops(self, samples: dict[str, int]) -> int:
        """FLOPs of the given number of rows of each kind of work."""
        new = set(samples) - set(self.flops_per_sample)
        if new:
            model_work = self.model_work()
            for kind in new:
                counted = model_work.recomputed_flops() if kind == RECOMPUTED else model_work.count(kind).total_flops
                self.flops_per_sample[kind] = counted
        return sum(self.flops_per_sample[kind] * count for kind, count in samples.items())

    def model_work(self) -> ModelWork:
        """A counter for the shapes seen. There must have been a forward."""
        assert self.shape is not None
        models = self.models
        of_run = (models.base, self.policy, models.dtype, self.shape, models.adapted)
        return ModelWork(*of_run, checkpoint=self.checkpoint, merged=models.merged)

    def _counted(self, count: Callable[[str, Given], None], kind: str, forward: Forward, given: Given) -> Tensor:
        count(kind, given)
        return forward(given)

    def _on_forward(self, kind: str, given: Given) -> None:
        self.shape = SampleShape.of_given(self.latent, given)
        count = len(given)
        trained = kind == POLICY and torch.is_grad_enabled()
        for name in (kind, BACKWARD) if trained else (kind,):
            if trained or kind != POLICY or self.frozen_policy:
                self.samples[name] += count
            self.batches[name] = max(count, self.batches.get(name, 0))

    def _on_execution(self, kind: str, given: Given) -> None:
        trained = kind == POLICY and torch.is_grad_enabled()
        again = (RECOMPUTED,) if self.checkpoint is not None else ()
        for name in (kind, BACKWARD, *again) if trained else (kind,):
            self.executed[name] += len(given)
