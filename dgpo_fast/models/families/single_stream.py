"""What Z-Image and Lumina2 share: image and caption are one stream of tokens, and captions have unlike lengths.

diffusers' transformers take a batch apart by the lengths of its captions: each tuple of lengths has shapes of its own,
which would be compiled anew. Here all captions of a batch are padded to one length. The mask and the positions follow
from a tensor of their lengths, and what is masked changes nothing.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import Architecture
from dgpo_fast.models.families.autoencoder_kl import KLLatents
from dgpo_fast.models.families.calling import called
from dgpo_fast.models.family import AttentionShape, Grid, Rows, even_sigmas, random_tokens, rounded_up

PATCH = 2


class SingleStream(KLLatents):
    """A transformer that refines image and caption apart, then reads them as one.

    Attributes:
        depth_names: the configuration's names for the number of blocks in each refiner, and of joint blocks.
    """

    text_parts = ("text_encoder", "tokenizer")
    block_names = ("noise_refiner", "context_refiner", "layers")
    depth_names: ClassVar[tuple[str, str]]
    pads_to = 32
    attention_names = ("native",)  # flash kernels take no mask, and the others are timed without one

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.largest_side = min(self.architecture.transformer["axes_lens"][1:]) * self.multiple

    @property
    @abstractmethod
    def heads(self) -> tuple[int, int]:
        """How many heads attend, and how wide each is."""

    @property
    @abstractmethod
    def longest_caption(self) -> int:
        """Tokens that the transformer has positions for."""

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        config = self.architecture.transformer
        refiners, layers = ([1, config[name] - 1][: config[name]] for name in self.depth_names)
        # With LoRA, nothing in front of either refiner needs a gradient, so its first block saves less than the next.
        # The first joint block saves the mask and the positions for all.
        small = {name: len(kinds) for name, kinds in zip(self.depth_names, (refiners, layers), strict=True)}
        return {**config, **small}, [*refiners, *refiners, *layers]

    def grid(self, steps: int, latent: tuple[int, ...]) -> Grid:
        return Grid(self.architecture.shift, sigmas=even_sigmas(steps))

    # Prompts

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if length > self.longest_caption:
            raise UserError(
                f"rollout.max_sequence_length {length}: {self.title} has positions for {self.longest_caption} tokens; "
                f"use --rollout.max-sequence-length {self.longest_caption}"
            )

    def random_condition(self, text: str, length: int) -> Rows:
        """As `Family` has it, with `length` tokens, the most that a prompt can have. Raises as `check_length`."""
        self.check_length(length)
        return {"text": random_tokens(text, length, self.architecture.transformer["cap_feat_dim"])}

    def stack(self, rows: Sequence[Rows], tokens: int) -> Rows:
        """{"text": (U, T, D), "length": (U,) int64}; T is rounded up to `pads_to` in any case."""
        texts = [row["text"] for row in rows]
        lengths = [len(text) for text in texts]
        whole = rounded_up(max(tokens, *lengths), self.pads_to)
        padded = [F.pad(text, (0, 0, 0, whole - len(text))) for text in texts]
        return {"text": torch.stack(padded), "length": torch.tensor(lengths, device=texts[0].device)}

    # Forwards

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        text, time = condition["text"], (1000 - timestep) / 1000  # 0 is noise here
        return called(transformer, self.predict, x_t.to(text.dtype), time, text, condition["length"])

    @abstractmethod
    def predict(self, transformer: Any, x: Tensor, time: Tensor, text: Tensor, length: Tensor) -> Tensor:
        """ε − x0, (B, C, H, W), by the parts of `transformer`; its own forward has the other sign.

        Args:
            transformer: of this family.
            x: (B, C, H, W) noisy latents.
            time: (B,), 1 − σ.
            text: (B, T, D), T a multiple of `pads_to`.
            length: (B,) int64, each caption's own tokens.
        """

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        image, text = self.image_tokens(latent), rounded_up(text_tokens, self.pads_to)
        refiners, layers = (self.architecture.transformer[name] for name in self.depth_names)
        kinds = (image + text, layers, text), (image, refiners, 0), (text, refiners, text)
        shapes = [AttentionShape(batch, tokens, *self.heads, calls, of) for tokens, calls, of in kinds]
        return tuple(sorted(shapes, key=lambda shape: -shape.tokens))


def to_patches(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, N, 4C): patches of 2 × 2, row by row, channels last."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def from_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_patches`, for latents of `height` × `width`."""
    grid = patches.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (height // PATCH, width // PATCH))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def image_positions(start: Tensor, height: int, width: int) -> Tensor:
    """(B, N, 3) positions of the patches of latents of `height` × `width`: `start` (B,), row, column."""
    rows, columns = (torch.arange(side // PATCH, device=start.device) for side in (height, width))
    places = torch.cartesian_prod(rows, columns).expand(len(start), -1, -1)
    return torch.cat([start[:, None, None].expand(-1, places.shape[1], 1), places], dim=-1)


def text_positions(batch: int, numbers: Tensor) -> Tensor:
    """(B, T, 3) positions of captions, whose tokens have `numbers` (T,) on the first axis."""
    return F.pad(numbers[:, None], (0, 2)).expand(batch, -1, -1)
