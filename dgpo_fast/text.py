"""Prompts as the transformer reads them, each distinct prompt encoded once."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dgpo_fast.errors import UserError


@dataclass(frozen=True)
class TextEmbeds:
    """Encoded prompts.

    Attributes:
        prompt: (B, T, D) token embeddings of the CLIP encoders followed by those of T5.
        pooled: (B, E) pooled CLIP embeddings.
    """

    prompt: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: slice | Tensor) -> "TextEmbeds":
        return TextEmbeds(self.prompt[rows], self.pooled[rows])

    def repeat_interleave(self, count: int) -> "TextEmbeds":
        """Each row `count` times: prompts → samples of groups."""
        return TextEmbeds(self.prompt.repeat_interleave(count, 0), self.pooled.repeat_interleave(count, 0))

    def expand(self, batch: int) -> "TextEmbeds":
        """A single row seen as `batch` rows, without a copy."""
        return TextEmbeds(self.prompt.expand(batch, -1, -1), self.pooled.expand(batch, -1))


class PromptEncoder:
    """Encodes prompts with a pipeline's own text encoders and remembers them.

    Raises UserError for no T5 tokens where the pipeline has a T5 encoder.

    Args:
        pipeline: the pipeline; its encoders stay on their device.
        max_sequence_length: tokens of the T5 part.
        cache_mib: memory for remembered prompts, in MiB; the least recently used are forgotten.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, max_sequence_length: int, cache_mib: int = 2048):
        if max_sequence_length == 0 and pipeline.text_encoder_3 is not None:
            raise UserError("rollout.max_sequence_length 0: this pipeline has a T5 encoder; give it tokens, as in "
                            "--rollout.max-sequence-length 128")  # fmt: skip
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.cache_bytes = cache_mib * 2**20
        self.cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> TextEmbeds:
        """(B,) texts → embeddings on the pipeline's device, in its dtype."""
        wanted = dict.fromkeys(prompts)
        known = {text: self.cache[text] for text in wanted if text in self.cache}
        known |= {text: self._encode(text) for text in wanted if text not in known}
        for text in wanted:
            self.cache[text] = known[text]
            self.cache.move_to_end(text)
        self._forget()
        rows = [known[text] for text in prompts]
        return TextEmbeds(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))

    @torch.no_grad()
    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        # One at a time: in a batch, the last bits of an embedding would depend on the prompts beside it, and a resumed
        # run, which has other prompts left to encode, would drift away from one that was never stopped.
        prompt, _, pooled, _ = self.pipeline.encode_prompt(
            text, text, text, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return prompt[0], pooled[0]

    def _forget(self) -> None:
        size = sum(tensor.nbytes for row in self.cache.values() for tensor in row)
        while size > self.cache_bytes:
            _, row = self.cache.popitem(last=False)
            size -= sum(tensor.nbytes for tensor in row)
