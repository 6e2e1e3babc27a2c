"""The sets of weights of a run whose processes hold a part of each (`distributed.shard`)."""

from itertools import chain
from typing import cast

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dgpo_fast.config.options import Policy as PolicyConfig
from dgpo_fast.distributed.shards import Shards
from dgpo_fast.models.family import family_of
from dgpo_fast.models.policy import PolicyModels, Weights, own_copy


class ShardedModels(PolicyModels):
    """As `PolicyModels`, for full fine-tuning: every transformer is cut, and `weights` are this process's shards.

    Args:
        transformer: the pretrained transformer, frozen, on its device in the run's dtype; it is cut too.
        config: what to train.
        shards: where the shards lie.
    """

    shards: Shards

    def __init__(self, transformer: ModelMixin, config: PolicyConfig, shards: Shards):
        self.shards = shards
        super().__init__(transformer, config, seed=0)

    def _make(self, seed: int) -> dict[str, nn.Parameter]:
        """Cuts each transformer before the next one is copied: only one of them is whole beside the original."""
        self.behaviour = own_copy(self.base)
        behaviour = self._cut(self.behaviour)
        self.policy = own_copy(self.base).requires_grad_(True).float()
        self.sharded = self._cut(self.policy)
        base = self._cut(self.base)
        self.behaviour_shards, self.base_shards = (
            {name: weight.to_local() for name, weight in weights.items()} for weights in (behaviour, base)
        )
        return {name: nn.Parameter(cast(DTensor, weight.detach()).to_local()) for name, weight in self.sharded.items()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole trained tensors."""
        return {name: weight.shape for name, weight in self.sharded.items()}

    def take_gradients(self) -> None:
        """Gives the shards of the gradient, summed over processes, to `weights`."""
        for name, weight in self.sharded.items():
            if weight.grad is not None:
                self.weights[name].grad, weight.grad = cast(DTensor, weight.grad).to_local(), None

    def whole(self, tensors: Weights) -> dict[str, Tensor]:
        """Copies of what this process holds parts of, whole, on process 0's CPU. All processes must call it together.

        Args:
            tensors: shaped as `weights`, by their names, or as the optimizer's state of them is named.
        """
        return {
            # A counter is the same on every process; a copy, for the next step counts on in place.
            name: tensor.to("cpu", copy=True) if tensor.dim() == 0 else self.shards.whole(tensor, self._cut_as(name))
            for name, tensor in tensors.items()
        }

    def parts(self, tensors: Weights) -> Weights:
        """This process's parts of what `whole` gave."""
        return {
            name: tensor if tensor.dim() == 0 else self.shards.part(tensor, self._cut_as(name))
            for name, tensor in tensors.items()
        }

    def _held_by_behaviour(self) -> Weights:
        return self.behaviour_shards

    def _held_by_base(self) -> Weights:
        return self.base_shards

    def _cut(self, transformer: ModelMixin) -> dict[str, DTensor]:
        return self.shards.cut(transformer, family_of(transformer).blocks(transformer), self.dtype)

    def _cut_as(self, name: str) -> DTensor:
        """The weight that `name` is of: its own, or that at the position in `12/exp_avg`."""
        owner = name.split("/")[0]
        return list(self.sharded.values())[int(owner)] if owner.isdecimal() else self.sharded[name]

    def _with(self, weights: Weights) -> ModelMixin:
        transformer = family_of(self.base).build_transformer(self.base.config)
        given = {**weights, **dict(self.base.named_buffers())}
        for name, own in chain(transformer.named_parameters(), transformer.named_buffers()):
            own.data = given[name].to(own.device, self.dtype if own.requires_grad else given[name].dtype)
        return transformer
