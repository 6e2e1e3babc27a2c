"""What a model family is: all that a run asks of one, in one class. `families/` has a file for each.

Outside of a family, latents are unpacked (B, C, H, W) in fp32, x_t = (1 − σ)·x0 + σ·ε, and a velocity is ε − x0. How the
transformer's time is scaled and signed, how latents are packed, position ids, masks, text padding, and the decoder's
statistics stay inside.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dgpo_fast.models.architecture import Architecture

Rows = Mapping[str, Tensor]
"""Named tensors of encoded prompts: of one prompt without a batch axis, of a batch with the batch in front."""
Rule = Callable[[Tensor, Tensor], Tensor]
"""(guided, conditional) velocities (B, C, H, W) → the velocity that is used."""


@dataclass(frozen=True)
class Grid:
    """How the few-step grid of a model is made.

    Attributes:
        shift: k of s(σ) = k·σ / (1 + (k − 1)·σ).
        linear: n steps at s(1), s(1 − 1/n), …, s(1/n); else the grid that diffusers' scheduler makes if a pipeline
            gives it none: from 1 to s(1/1000), shifted once more by Euler's, and beginning below 1 with DPM-Solver++.
        last: the last σ before 0, to which a linear grid is stretched; None: as it falls.
    """

    shift: float
    linear: bool = False
    last: float | None = None


@dataclass(frozen=True)
class Guidance:
    """What one number for guidance means to a model.

    Attributes:
        scale: g of v_neg + g·(v_cond − v_neg); 1 if the negative prompt is not predicted.
        embedded: the number that the transformer reads beside the prompt; None if it reads none.
        rule: applied to the guided velocity; None for the plain rule, which the kernels fuse with the solver's step.
    """

    scale: float
    embedded: float | None = None
    rule: Rule | None = None

    @property
    def pairs(self) -> bool:
        """Whether the negative prompt is predicted too."""
        return self.scale > 1

    def combine(self, conditional: Tensor, negative: Tensor) -> Tensor:
        """The guided velocity (B, C, H, W)."""
        guided = negative + self.scale * (conditional - negative)
        return guided if self.rule is None else self.rule(guided, conditional)


@dataclass(frozen=True)
class AttentionShape:
    """One kind of attention in a forward: `calls` of (batch, tokens, heads, head_dim), the last `text` tokens text."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    calls: int
    text: int = 0


class Family(ABC):
    """One family of models. Made for one model, from its configuration files alone.

    Args:
        architecture: of the model.

    Attributes:
        title: as a person calls it.
        text_parts: the pipeline's text encoders and tokenizers, by their names in it.
        block_names: the transformer's lists of blocks, in the order of a forward: they are compiled, checkpointed and
            sharded one by one.
        lora_targets: the layers that get a LoRA by default: ends of names, or one regular expression of whole names.
        multiple: pixels that each side of a picture is a multiple of.
        largest_side: of a picture, in pixels; None if there is no limit.
        text_length: tokens of a prompt that the family's own pipeline takes by default.
        pads_to: rows of text are padded to a multiple of this many tokens, which a mask hides; 0 if the length is fixed
            by `rollout.max_sequence_length`, because the padding changes the pictures.
        attention_names: kernels that its attention can be switched to, of those in `engine/attention.py`.
    """

    title: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]]
    block_names: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...] | str]
    multiple: ClassVar[int] = 16
    largest_side: int | None = None
    text_length: ClassVar[int] = 512
    pads_to: ClassVar[int] = 0
    attention_names: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, architecture: "Architecture"):
        self.architecture = architecture

    def __deepcopy__(self, memo: dict) -> "Family":
        """Itself: nothing of it changes, and transformers that are copied carry it."""
        return self

    # What it is made of

    @property
    @abstractmethod
    def pipeline_class(self) -> type:
        """diffusers' pipeline, which also saves LoRAs."""

    @property
    @abstractmethod
    def transformer_class(self) -> type[nn.Module]:
        """diffusers' transformer."""

    @property
    @abstractmethod
    def vae_class(self) -> type[nn.Module]:
        """diffusers' autoencoder."""

    @property
    def distilled(self) -> bool:
        """Whether the model is distilled to a few steps: a denoising loss would blur its pictures."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run on this model says at its start."""
        return ()

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's blocks, in the order of a forward."""
        return [block for name in self.block_names for block in transformer.get_submodule(name)]  # type: ignore[union-attr]

    @abstractmethod
    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        """A transformer's configuration with one block of each kind, and how many of each the whole one has, in the
        order of `blocks`. Blocks are of a kind if they save the same in a forward; with a LoRA the first saves less."""

    # Latents and pictures

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model's files, or its pipeline's defaults, name."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, H, W) of the latent of a picture, whose sides are multiples of `multiple` pixels."""

    @abstractmethod
    def image_tokens(self, latent: tuple[int, ...]) -> int:
        """Tokens of a (C, H, W) latent in a forward."""

    @abstractmethod
    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """(B, C, H, W) latents, in fp32, → (B, 3, height, width) pixels, about in [−1, 1]; computed in the dtype of
        `vae`'s weights."""

    @abstractmethod
    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """The inverse of `decode`: (B, 3, height, width) in [−1, 1] → the most likely latents (B, C, H, W) in fp32."""

    def grid(self, steps: int, latent: tuple[int, ...]) -> Grid:
        """The model's own grid of `steps` steps for a (C, H, W) latent, by its scheduler's configuration."""
        return Grid(self.architecture.shift)

    # Prompts

    @abstractmethod
    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        """One prompt as the transformer reads it: named tensors without a batch axis, only its own tokens if padding is
        free (`pads_to`).

        Args:
            pipeline: with its text encoders.
            text: the prompt.
            length: `rollout.max_sequence_length`.
            negative: whether it is a negative prompt, which some families encode otherwise.
        """

    @abstractmethod
    def random_condition(self, text: str, length: int) -> Rows:
        """As `encode`, random numbers of the trained encoders' sizes, a function of the text; fp32 on the CPU."""

    def stack(self, rows: Sequence[Rows], tokens: int) -> Rows:
        """Encoded prompts → (U, …) tensors of one length.

        Args:
            rows: of `encode`.
            tokens: all are padded to this many, a multiple of `pads_to`; 0 if they are of one length.
        """
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @abstractmethod
    def text_tokens(self, rows: Rows) -> int:
        """Text tokens of a forward, of one encoded prompt or of stacked ones."""

    # Forwards

    def guidance(self, scale: float) -> Guidance:
        """What the setting `guidance_scale` means: the number is the family's own, as on its card."""
        return Guidance(max(scale, 1.0))

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        """ε − x0 as the transformer predicts it, (B, C, H, W), in its dtype.

        Args:
            transformer: of this family.
            x_t: (B, C, H, W) noisy latents, any float dtype.
            timestep: (B,), 1000·σ, or what the solver rounds that to.
            condition: (B, …) tensors of the prompts.
            embedded: (B,), `Guidance.embedded`; None if the model reads none.
        """

    def set_attention(self, transformer: Any, name: str) -> None:
        """Has all blocks attend with the kernel `name` of diffusers' dispatcher."""
        transformer.set_attention_backend(name)

    @abstractmethod
    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        """Kinds of softmax attention in one forward of `batch` rows, largest first."""
