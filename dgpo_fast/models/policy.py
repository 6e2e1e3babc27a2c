"""The three sets of weights of a run.

* **base**: the frozen pretrained transformer W, whole or quantised (`policy.base_precision`). It is the reference, and
  carries no adapter.
* **policy**: what is trained. With LoRA it is W + (alpha / rank)·B·A, where W are the *same tensors* as the base's. It
  computes with adapters, or with merged weights of its own (`policy.forward`, `merged_lora`). The behaviour's copy
  cannot serve for that: it holds θ_old while the policy learns.
* **behaviour**: a merged copy without adapters, never quantised. It draws the rollouts and makes the old predictions.
  To save memory, it can instead be the base's tensors with a second adapter (`policy.behaviour`).

No adapter is switched on or off: `load_behaviour` writes weights into the behaviour copy, in fp32 arithmetic, once or
twice per iteration.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dgpo_fast.config.options import Policy as PolicyConfig
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import family_of
from dgpo_fast.models.lora import Factors, Lora, join, write_lora
from dgpo_fast.models.merged_lora import MergedLoraLinear, merge_all, merged_weight, use_merged_weights
from dgpo_fast.models.quantised import widen

if TYPE_CHECKING:
    from dgpo_fast.distributed.shards import Shards

ADAPTER = "default"
Weights = Mapping[str, Tensor]
"""Trained tensors by name: LoRA factors, or all of a transformer's parameters."""


def weight_storage(config: PolicyConfig, dtype: torch.dtype, sharded: bool = False) -> str:
    """How `config.weights` keeps the trained weights of a run in `dtype`: "fp32", "bf16_master" or "bf16_stochastic".

    Sharded weights are in fp32. Raises UserError if bf16 weights are asked for in a run that is not in bf16.
    """
    if sharded:
        return "fp32"
    if config.weights == "auto":
        return "bf16_master" if dtype == torch.bfloat16 else "fp32"
    if config.weights != "fp32" and dtype != torch.bfloat16:
        raise UserError(f"policy.weights {config.weights} is for runs in bf16: give --precision bf16, or another one")
    return config.weights


def is_merged(config: PolicyConfig, on_gpu: bool) -> bool:
    """Whether the policy computes with merged weights, by `config.forward`.

    Raises UserError if that is asked for where there is no LoRA.
    """
    if config.forward == "merged" and config.train == "full":
        raise UserError(
            "policy.forward merged is for LoRA: use --policy.train lora, or leave out --policy.forward with "
            "--policy.train full"
        )
    if config.forward == "auto":
        return config.train == "lora" and config.behaviour == "merged" and on_gpu
    return config.forward == "merged"


class PolicyModels:
    """Base, policy and behaviour transformers of one pipeline. `sharded.ShardedModels` cuts them over processes.

    Args:
        transformer: the pretrained transformer, frozen, on its device in the run's dtype.
        config: what to train.
        seed: of the LoRA factors' Gaussian initialisation.
        start: a LoRA that is merged into `transformer`, and is saved together with what is trained.

    Attributes:
        weights: what this process trains, by name.
        adapted: whether the behaviour weights are a second adapter instead of a merged copy.
        merged: whether the policy computes with merged weights.
        merge_kept: the share of the policy's LoRA that rounding its merged weights keeps, a scalar; None if it is all.
        shards: None if every process holds all weights.
        after_load: called after the behaviour copy's weights have changed.
    """

    adapted = False
    shards: "Shards | None" = None

    def __init__(self, transformer: ModelMixin, config: PolicyConfig, seed: int, start: Lora | None = None):
        self.config = config
        self.start = start
        self.base = transformer
        self.dtype = transformer.dtype
        self.after_load: list[Callable[[], None]] = []
        self.storage = weight_storage(config, transformer.dtype, self.shards is not None)
        self.merged = is_merged(config, transformer.device.type == "cuda")
        self.merge_kept: Tensor | None = None
        self._merged_layers: Sequence[MergedLoraLinear] = ()
        self.weights = self._make(seed)
        self.weights_changed()

    def _make(self, seed: int) -> dict[str, nn.Parameter]:
        """Makes `behaviour` and `policy`; returns the trained weights."""
        config = self.config
        self.adapted = config.train == "lora" and config.behaviour == "adapter"
        if self.adapted:
            self.behaviour = with_lora(_sharing_copy(self.base), config, seed).requires_grad_(False)
            for factor in self.behaviour.parameters():
                factor.data = factor.data.to(self.dtype)
        else:
            self.behaviour = own_copy(self.base)
        if config.train == "lora":
            self.policy = with_lora(_sharing_copy(self.base), config, seed)
        else:
            self.policy = own_copy(self.base).requires_grad_(True)
        weights = {name: weight for name, weight in self.policy.named_parameters() if weight.requires_grad}
        for weight in weights.values():
            weight.data = weight.data.to(torch.float32 if self.storage == "fp32" else torch.bfloat16)
            # Gradients of all micro-batches and timesteps add up in fp32.
            weight.grad_dtype = torch.float32
        if self.merged:
            self._merged_layers = use_merged_weights(self.policy)
        return weights

    @property
    def trained_numel(self) -> int:
        """Trained weights of all processes together."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the trained tensors."""
        return {name: weight.shape for name, weight in self.weights.items()}

    def take_gradients(self) -> None:
        """Has the gradient of the last backward in `weights`."""

    def whole(self, tensors: Weights) -> Weights:
        """`tensors`, which are shaped as `weights` or as the optimizer's states of them: they are whole."""
        return tensors

    def parts(self, tensors: Weights) -> Weights:
        """This process's parts of what `whole` gave: all of it."""
        return tensors

    def _held_by_behaviour(self) -> Weights:
        return dict(self.behaviour.named_parameters())

    def _held_by_base(self) -> Weights:
        return dict(self.base.named_parameters())

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def mixed(self) -> bool:
        """Whether the policy computes in bf16 with some weights in fp32."""
        return self.dtype == torch.bfloat16 and next(iter(self.weights.values())).dtype == torch.float32

    @torch.no_grad()
    def load_behaviour(self, weights: Weights) -> None:
        """Makes the behaviour copy predict what the policy would with `weights`. In place, without a host sync."""
        own = self._held_by_behaviour()
        if self.adapted or self.config.train == "full":
            torch._foreach_copy_([own[name] for name in weights], list(weights.values()))
        else:
            for name, layer in self._lora_layers():
                down, up = (weights[f"{name}.lora_{factor}.{ADAPTER}.weight"] for factor in "AB")
                own[f"{name}.weight"].copy_(merged_weight(layer, down, up))
        for action in self.after_load:
            action()

    def initial_weights(self) -> Weights:
        """Weights with which the policy predicts what the base model does."""
        if self.config.train == "full":
            return self._held_by_base()
        return {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    @torch.no_grad()
    def load_weights(self, weights: Weights) -> None:
        """Overwrites the policy's trained tensors, as when a run is resumed."""
        for name, parameter in self.weights.items():
            parameter.copy_(weights[name])
        self.weights_changed()

    def weights_changed(self) -> None:
        """Has to be called after every change of `weights`: merges them anew if the policy computes so. In place."""
        self.merge_kept = merge_all(self._merged_layers)

    def save(self, weights: Weights, folder: Path, pipeline: DiffusionPipeline) -> None:
        """Writes `weights` so that plain diffusers loads them: a LoRA file, or a whole pipeline folder.

        Args:
            weights: the tensors to save, usually the slow average; if weights are sharded, what `whole` gave.
            folder: where `pytorch_lora_weights.safetensors`, or the pipeline's folders, go.
            pipeline: the run's pipeline; with full fine-tuning, all of it but the transformer is saved as it is.
        """
        if self.config.train == "full":
            original, pipeline.transformer = pipeline.transformer, self._with(weights)
            pipeline.save_pretrained(folder, safe_serialization=True)
            pipeline.transformer = original
            return
        factors = {
            name: Factors(
                weights[f"{name}.lora_A.{ADAPTER}.weight"].detach(),
                weights[f"{name}.lora_B.{ADAPTER}.weight"].detach() * layer.scaling[ADAPTER],
            )
            for name, layer in self._lora_layers()
        }
        if self.start is not None:
            factors = join(self.start.parts["transformer"], factors)
        write_lora(folder, factors, self.policy.peft_config[ADAPTER].to_dict(), family_of(self.base))

    def _with(self, weights: Weights) -> ModelMixin:
        """A transformer with `weights`, not sharded."""
        self.load_behaviour(weights)
        return self.behaviour

    def _lora_layers(self) -> list[tuple[str, LoraLayer]]:
        return [(name, module) for name, module in self.policy.named_modules() if isinstance(module, LoraLayer)]


def own_copy(module: ModelMixin) -> ModelMixin:
    """A copy with parameters of its own, none of them quantised; buffers, which nothing ever changes, are the
    original's."""
    copied = copy.deepcopy(module, {id(buffer): buffer for buffer in module.buffers()})
    widen(copied)
    return copied


def _sharing_copy(module: ModelMixin) -> ModelMixin:
    """A copy of the modules whose parameters and buffers are the original's own tensors."""
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


def with_lora(transformer: ModelMixin, config: PolicyConfig, seed: int) -> ModelMixin:
    """`transformer` with trainable adapters put in, in place. Raises UserError if a target is not there."""
    targets = lora_targets(transformer, config)
    adapted_layers(transformer, targets)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(lora, adapter_name=ADAPTER)
    return transformer


def lora_targets(transformer: ModelMixin, config: PolicyConfig) -> tuple[str, ...] | str:
    """Ends of the names of the layers that get a LoRA, or one regular expression of whole names."""
    chosen = config.lora_targets or family_of(transformer).lora_targets
    alone = chosen[0] if not isinstance(chosen, str) and len(chosen) == 1 else chosen
    return alone if isinstance(alone, str) and not re.fullmatch(r"[\w.]+", alone) else chosen


def adapted_layers(transformer: nn.Module, targets: tuple[str, ...] | str) -> list[nn.Linear]:
    """The linear layers that get a LoRA by `lora_targets`. Raises UserError if one of these hits none."""
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    ends = (targets,) if isinstance(targets, str) else targets
    hits = {end: [name for name in layers if _is_hit(name, end, whole=isinstance(targets, str))] for end in ends}
    unmatched = next((end for end, hit in hits.items() if not hit), None)
    if unmatched is not None:
        raise UserError(f"policy.lora_targets: no linear layer of this transformer is called '{unmatched}'")
    hit = set(chain.from_iterable(hits.values()))
    return [module for name, module in layers.items() if name in hit]


def is_target(name: str, targets: tuple[str, ...] | str) -> bool:
    """Whether the layer called `name` gets a LoRA by `targets`, as `lora_targets` gives them."""
    ends = (targets,) if isinstance(targets, str) else targets
    return any(_is_hit(name, end, whole=isinstance(targets, str)) for end in ends)


def _is_hit(name: str, target: str, *, whole: bool) -> bool:
    return bool(re.fullmatch(target, name)) if whole else f".{name}".endswith(f".{target}")


def autocast(models: PolicyModels) -> torch.autocast:
    """bf16 arithmetic for the policy's forward if the run is in bf16 and trained weights are fp32."""
    return torch.autocast(models.device.type, dtype=torch.bfloat16, enabled=models.mixed)
