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
def sum_gradients(weights: Mapping[str, nn.Parameter], processes: Processes, what: str) -> None:
    """Sums `.grad` of `weights` over all processes in place.

    A weight without a gradient here (a process whose groups were all dropped) counts as zero. A NaN on one process
    makes the sum NaN on all of them, so all processes see the same without further communication.

    Args:
        weights: the trained parameters.
        processes: who takes part.
        what: named in the error if the others do not come.
    """
    if processes.count == 1:
        return
    for weight in weights.values():
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    for bucket in _buckets(weight.grad for weight in weights.values() if weight.grad is not None):
        flat = torch.cat([gradient.reshape(-1).float() for gradient in bucket])
        processes.sum(flat, what)
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


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
