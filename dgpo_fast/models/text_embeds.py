"""Encoded prompts of a batch: each distinct text is held once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgpo_fast.models.family import Rows


@dataclass(frozen=True)
class TextEmbeds:
    """Encoded prompts of B samples, and their negative prompts. Slices of it and repetitions share the rows; each
    forward gathers its own.

    Attributes:
        rows: (U, …) tensors of the U distinct texts, as the model's family names them. There may be rows of texts that
            none of the samples has.
        index: (B,) int64, the row of each sample's prompt, on the same device.
        negative_index: (B,) int64, the row of each sample's negative prompt; None if there is no guidance.
        embedded: the number for guidance that the transformer reads beside the prompts; None if it reads none.
    """

    rows: Rows
    index: Tensor
    negative_index: Tensor | None = None
    embedded: float | None = None

    @classmethod
    def of_samples(cls, rows: Rows) -> "TextEmbeds":
        """Rows (B, …) that belong to one sample each, without negative prompts."""
        first = next(iter(rows.values()))
        return cls(rows, torch.arange(len(first), device=first.device))

    @classmethod
    def joined(cls, parts: Sequence["TextEmbeds"]) -> "TextEmbeds":
        """Slices of the same embeddings end to end."""
        negative = [part.negative_index for part in parts if part.negative_index is not None]
        index = torch.cat([part.index for part in parts])
        return replace(parts[0], index=index, negative_index=torch.cat(negative) if negative else None)

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> "TextEmbeds":
        """The prompts of some of the samples."""
        return self._indexed(lambda index: index[rows])

    def repeat_interleave(self, count: int) -> "TextEmbeds":
        """Each sample's prompt `count` times: prompts → samples of groups."""
        return self._indexed(lambda index: index.repeat_interleave(count))

    def negative(self) -> "TextEmbeds":
        """The negative prompts, as prompts."""
        assert self.negative_index is not None, "encoded without negative prompts"
        return replace(self, index=self.negative_index, negative_index=None)

    def with_embedded(self, number: float | None) -> "TextEmbeds":
        """The same prompts, with another number for guidance."""
        return replace(self, embedded=number)

    def gathered(self) -> dict[str, Tensor]:
        """A row for each sample: (B, …) tensors, as a forward takes them."""
        return {name: rows[self.index] for name, rows in self.rows.items()}

    def gathered_pairs(self) -> dict[str, Tensor]:
        """(2B, …) for guidance: a row for each sample's prompt, then one for each negative prompt."""
        assert self.negative_index is not None, "encoded without negative prompts"
        both = torch.cat([self.index, self.negative_index])
        return {name: rows[both] for name, rows in self.rows.items()}

    def _indexed(self, change: Callable[[Tensor], Tensor]) -> "TextEmbeds":
        negative = None if self.negative_index is None else change(self.negative_index)
        return replace(self, index=change(self.index), negative_index=negative)
