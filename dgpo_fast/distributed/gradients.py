"""The sum of gradients over processes.

Each process's loss is already its part of the whole (a sum over its samples, divided by the counts of all), so
gradients are summed, never averaged: shares of any size are exact.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dgpo_fast.distributed.processes import Processes

BUCKET_NUMEL = 64 * 2**20
"""Elements sent at once: 256 MiB in fp32, so that the copy stays small beside the weights. All of a LoRA fits one."""


@torch.no_grad()
def sum_gradients(
    weights: Mapping[str, nn.Parameter], numbers: Mapping[str, Tensor], processes: Processes, what: str
) -> dict[str, Tensor]:
    """Sums `.grad` of `weights` over all processes in place, and `numbers` with them, which are returned.

    A weight without a gradient here (a process whose groups were all dropped) counts as zero. A NaN anywhere makes the
    sum NaN everywhere, so that all processes see the same and none has to be asked.

    Args:
        weights: the trained parameters.
        numbers: 0-dim tensors; every process gives the same names.
        processes: who takes part.
        what: named in the error where the others do not come.
    """
    if processes.count == 1:
        return dict(numbers)
    names = sorted(numbers)
    device = next(iter(weights.values())).device
    tail = torch.stack([numbers[name].float().to(device) for name in names]) if names else torch.zeros(0, device=device)
    for weight in weights.values():
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    buckets = list(_buckets([weight.grad for weight in weights.values() if weight.grad is not None]))
    for index, bucket in enumerate(buckets):
        extra = [tail] if index == len(buckets) - 1 else []
        flat = torch.cat([tensor.reshape(-1).float() for tensor in [*bucket, *extra]])
        processes.sum(flat, what)
        parts = flat.split([tensor.numel() for tensor in [*bucket, *extra]])
        for tensor, part in zip([*bucket, *extra], parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    return dict(zip(names, tail.unbind(), strict=True))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    numel = 0
    for tensor in tensors:
        if bucket and numel + tensor.numel() > BUCKET_NUMEL:
            yield bucket
            bucket, numel = [], 0
        bucket.append(tensor)
        numel += tensor.numel()
    yield bucket
