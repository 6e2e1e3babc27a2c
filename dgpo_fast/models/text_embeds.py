"""Encoded prompts of a batch: each distinct text is held once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextEmbeds:
    """Encoded prompts of B samples, and their negative prompts. Slices of it and repetitions share the rows; each
    forward gathers its own.

    Attributes:
        prompt: (U, T, D) token embeddings of the U distinct texts: those of the CLIP encoders, then those of T5.
        pooled: (U, E) pooled CLIP embeddings.
        index: (B,) int64, the row of each sample's prompt, on the same device.
        negative_index: (B,) int64, the row of each sample's negative prompt; None if there is no guidance.
    """

    prompt: Tensor
    pooled: Tensor
    index: Tensor
    negative_index: Tensor | None = None

    @classmethod
    def of_samples(cls, prompt: Tensor, pooled: Tensor) -> "TextEmbeds":
        """Rows (B, T, D) and (B, E) that belong to one sample each, without negative prompts."""
        return cls(prompt, pooled, torch.arange(len(pooled), device=pooled.device))

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

    def gathered(self) -> tuple[Tensor, Tensor]:
        """A row for each sample: (B, T, D) token embeddings and (B, E) pooled ones, as a forward takes them."""
        return self.prompt[self.index], self.pooled[self.index]

    def gathered_pairs(self) -> tuple[Tensor, Tensor]:
        """(2B, T, D) and (2B, E) for guidance: a row for each sample's prompt, then one for each negative prompt."""
        assert self.negative_index is not None, "encoded without negative prompts"
        both = torch.cat([self.index, self.negative_index])
        return self.prompt[both], self.pooled[both]

    def _indexed(self, change: Callable[[Tensor], Tensor]) -> "TextEmbeds":
        negative = None if self.negative_index is None else change(self.negative_index)
        return replace(self, index=change(self.index), negative_index=negative)
