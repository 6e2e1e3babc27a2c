"""Encoded prompts of a batch: each distinct prompt is held once."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextEmbeds:
    """Encoded prompts of B samples. Slices of it and repetitions share the rows; each forward gathers its own.

    Attributes:
        prompt: (U, T, D) token embeddings of the U distinct prompts: those of the CLIP encoders, then those of T5.
        pooled: (U, E) pooled CLIP embeddings.
        index: (B,) int64, the row of each sample, on the same device.
    """

    prompt: Tensor
    pooled: Tensor
    index: Tensor

    @classmethod
    def of_samples(cls, prompt: Tensor, pooled: Tensor) -> "TextEmbeds":
        """Rows (B, T, D) and (B, E) that belong to one sample each."""
        return cls(prompt, pooled, torch.arange(len(pooled), device=pooled.device))

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.index)

    def __getitem__(self, rows: slice | Tensor) -> "TextEmbeds":
        """The prompts of some of the samples."""
        return replace(self, index=self.index[rows])

    def repeat_interleave(self, count: int) -> "TextEmbeds":
        """Each sample's prompt `count` times: prompts → samples of groups."""
        return replace(self, index=self.index.repeat_interleave(count))

    def gathered(self) -> tuple[Tensor, Tensor]:
        """A row for each sample: (B, T, D) token embeddings and (B, E) pooled ones, as a forward takes them."""
        return self.prompt[self.index], self.pooled[self.index]
