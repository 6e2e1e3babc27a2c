"""Texts of several lengths in one batch, for transformers that read a mask beside them."""

from collections.abc import Sequence

import torch

from dgpo_fast.models.family import Rows


def padded_with_mask(rows: Sequence[Rows], tokens: int) -> Rows:
    """Rows {"text": (T, D)} → {"text": (U, T, D), "mask": (U, T) bool}, for `Family.stack`.

    Padding stands behind a prompt's own tokens and is 0, and the mask is false there. The mask is there even if nothing
    is padded, so that a compiled block has one graph whatever the prompts are.
    """
    lengths = [len(row["text"]) for row in rows]
    first = rows[0]["text"]
    text = first.new_zeros(len(rows), tokens or lengths[0], first.shape[1])
    for padded, row, length in zip(text, rows, lengths, strict=True):
        padded[:length] = row["text"]
    own = torch.tensor(lengths, device=text.device)[:, None]
    return {"text": text, "mask": torch.arange(text.shape[1], device=text.device) < own}
