"""Full fine-tuning with every copy of the transformer cut into shards (FSDP2's `fully_shard`).

Optimizer, averages and the gradient's norm work on this process's shards, which are plain tensors. A block is only
gathered for its forward and backward passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dgpo_fast.config.options import Config
from dgpo_fast.distributed.processes import Processes
from dgpo_fast.errors import UserError


@dataclass(frozen=True)
class Shards:
    """Where the shards lie: over all processes, or over those of one machine, with a copy on each machine (hybrid).

    Attributes:
        mesh: the processes, (shards,) or (machines, shards).
        processes: the same ones.
    """

    mesh: DeviceMesh
    processes: Processes

    @property
    def copies(self) -> int:
        """How many processes hold the same shard."""
        return self.mesh.size(0) if self.mesh.ndim == 2 else 1

    def cut(self, transformer: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> dict[str, DTensor]:
        """Shards `transformer` in place, block by block; returns its parameters by name.

        Args:
            transformer: the same weights on every process.
            blocks: of it, in the order of a forward.
            dtype: of its blocks while they compute. Gradients are summed over the processes in fp32, never averaged:
                each process's loss is already its part of the whole.
        """
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # The root too is cut again after a forward: shards are written in between, and must be what the next one reads.
        for module in (*blocks, transformer):
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        for module in transformer.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return {name: cast(DTensor, weight) for name, weight in transformer.named_parameters()}

    def whole(self, shard: Tensor, weight: DTensor) -> Tensor:
        """The whole tensor of which this process holds `shard`, on the CPU of process 0; an empty one on the others.

        Args:
            shard: this process's part of a tensor that is cut as `weight` is.
            weight: gives shape and cut.

        All processes must call it together.
        """
        local = DTensor.from_local(
            shard.detach().to(weight.device),
            self.mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )
        with self.processes.waiting("the shards of the others", counted=False):
            whole = local.full_tensor()
        return whole.to("cpu", copy=True) if self.processes.first else torch.empty(0)

    def part(self, whole: Tensor, weight: DTensor) -> Tensor:
        """This process's shard of `whole`, cut as `weight` is, on its device. Nothing is sent."""
        return (
            distribute_tensor(whole.to(weight.device), self.mesh, weight.placements, src_data_rank=None)
            .to_local()
            .clone()
        )

    def gradient_norm(self, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """The norm of the whole gradient, the same on every process; not finite if any shard's is not."""
        device = next(iter(weights.values())).device
        norms = torch._foreach_norm([weight.grad for weight in weights.values() if weight.grad is not None])
        total = torch.stack(norms).double().square().sum() if norms else torch.zeros((), device=device).double()
        return (self.processes.sum(total, "the gradient's norm") / self.copies).sqrt().float()


def shards_for(config: Config, processes: Processes, device: torch.device) -> Shards | None:
    """The shards that the settings ask for; None if they ask for none.

    Raises UserError if the settings cannot be combined with sharded weights.
    """
    how = f"distributed.shard {config.distributed.shard}"
    if config.distributed.shard == "none":
        return None
    if config.policy.train != "full":
        raise UserError(f"{how} is for --policy.train full: LoRA's base weights are not sharded")
    if config.optimizer.name != "adamw":
        raise UserError(f"{how}: 8-bit optimizer states cannot be sharded; use --optimizer.name adamw")
    if config.policy.weights not in ("auto", "fp32"):
        raise UserError(f"{how} keeps the shards in fp32: use --policy.weights fp32")
    if config.data.source != "online":
        raise UserError(
            f"{how}: data.source {config.data.source} needs unsharded weights; use --distributed.shard none"
        )
    return make_shards(config.distributed.shard, processes, device)


def make_shards(kind: str, processes: Processes, device: torch.device) -> Shards | None:
    """The shards of `distributed.shard`; None if weights stay whole, as on one process.

    Raises UserError if machines hold different numbers of processes.
    """
    if kind == "none" or processes.count == 1:
        return None
    local = processes.local_count if kind == "hybrid" else processes.count
    if processes.count % local:
        raise UserError(
            f"distributed.shard hybrid: {processes.count} processes are not the same number on every machine "
            f"({local} on this one); use --distributed.shard full"
        )
    machines = processes.count // local
    shape, names = ((local,), ("shard",)) if machines == 1 else ((machines, local), ("machines", "shard"))
    processes.meet("the groups of the shards", device)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():
        processes.set_timeout(processes.timeout_s, group)
    return Shards(mesh, processes)
