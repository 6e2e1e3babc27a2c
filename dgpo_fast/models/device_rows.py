"""Encoded prompts stacked on a device, where they stay: those that were there before are not stacked or copied."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgpo_fast.models.family import Family, Rows
from dgpo_fast.models.meta import stacked

KEPT_BYTES = 64 * 2**20
"""Of prompts that stay on the device; those of one call are there in any case."""


class DeviceRows:
    """Rows of prompts in tensors that are only ever added to: what was handed out stays as it is.

    If more prompts come than are kept, new tensors are begun. The old ones live as long as someone holds them.

    Args:
        family: says how rows of different lengths are stacked.
        device: where they are kept.
        kept_bytes: most that are kept, but for those of one call.
    """

    def __init__(self, family: Family, device: torch.device, kept_bytes: int = KEPT_BYTES):
        self.family, self.device, self.kept_bytes = family, device, kept_bytes
        self.tensors: dict[str, Tensor] = {}
        self.places: dict[str, int] = {}
        self.tokens = 0

    def __call__(self, keys: Sequence[str], find: Callable[[str], Rows]) -> tuple[Rows, dict[str, int]]:
        """The stacked rows (U, …), and the place among them of each key.

        Args:
            keys: distinct ones, each of a prompt.
            find: the encoded prompt of a key, on the CPU; asked for those that are not here yet.
        """
        new = [key for key in keys if key not in self.places]
        if new:
            rows = {key: find(key) for key in new}
            if self._fits(rows):
                self._add(rows)
            else:
                self._begin({key: rows[key] if key in rows else find(key) for key in keys})
        return {name: tensor[: len(self.places)] for name, tensor in self.tensors.items()}, self.places

    def reserve(self, tokens: int) -> None:
        """Pads all rows to at least `tokens` tokens from now on."""
        if tokens > self.tokens:
            self.tokens, self.places = tokens, {}

    def _fits(self, rows: dict[str, Rows]) -> bool:
        """Whether the tensors can take these rows, which may be longer than those that are there."""
        if not self.places or (self.family.pads_to and self._longest(rows) > self.tokens):
            return False
        wanted = len(self.places) + len(rows)
        capacity = len(next(iter(self.tensors.values())))
        return wanted <= capacity or wanted * self._row_bytes() <= self.kept_bytes

    def _longest(self, rows: dict[str, Rows]) -> int:
        return max(self.family.text_tokens(row) for row in rows.values())

    def _row_bytes(self) -> int:
        return sum(tensor[0].nbytes for tensor in self.tensors.values())

    def _begin(self, rows: dict[str, Rows]) -> None:
        """New tensors, with these rows alone. Those of a bucket that has grown are as long as the longest seen."""
        whole = stacked(self.family, list(rows.values()), self.tokens)
        if self.family.pads_to:
            self.tokens = self.family.text_tokens(whole)
        self.tensors = {name: tensor.to(self.device) for name, tensor in whole.items()}
        self.places = {key: place for place, key in enumerate(rows)}

    def _add(self, rows: dict[str, Rows]) -> None:
        first, last = len(self.places), len(self.places) + len(rows)
        whole = stacked(self.family, list(rows.values()), self.tokens)
        capacity = len(next(iter(self.tensors.values())))
        if last > capacity:
            most = self.kept_bytes // max(self._row_bytes(), 1)
            self._grow(max(last, min(2 * capacity, most)))
        for name, tensor in self.tensors.items():
            tensor[first:last].copy_(whole[name])
        self.places = {**self.places, **{key: first + n for n, key in enumerate(rows)}}

    def _grow(self, capacity: int) -> None:
        for name, tensor in self.tensors.items():
            larger = tensor.new_empty((capacity, *tensor.shape[1:]))
            larger[: len(tensor)].copy_(tensor)
            self.tensors[name] = larger
