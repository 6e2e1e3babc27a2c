"""What a model family is: all that a run asks of one, in one class. `families/` has a file for each.

Outside of a family, latents are unpacked (B, C, H, W) in fp32, x_t = (1 − σ)·x0 + σ·ε, and a velocity is ε − x0. How
the transformer's time is scaled and signed, how latents are packed, position ids, masks, text padding, and the
decoder's statistics stay inside.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import Architecture
from dgpo_fast.models.attention import DISPATCHED
from dgpo_fast.models.lora_names import Target

Rows = Mapping[str, Tensor]
"""Named tensors of encoded prompts: of one prompt without a batch axis, of a batch with the batch in front."""
GUIDED = 4.0
"""A `guidance_scale` with which guidance is on, whatever a family counts from."""
Rule = Callable[[Tensor, Tensor], Tensor]
"""(guided, conditional) velocities (B, C, H, W) → the velocity that is used."""


@dataclass(frozen=True)
class Grid:
    """How the few-step grid of a model is made.

    Attributes:
        shift: k of s(σ) = k·σ / (1 + (k − 1)·σ).
        sigmas: of the n steps, falling from 1, before the shift, as a pipeline gives them to its scheduler
            (`even_sigmas`). None if it gives none: the scheduler's own grid, from 1 to s(1/1000), shifted once more by
            Euler's, and beginning below 1 with DPM-Solver++.
        last: the last σ before 0, to which a grid of `sigmas` is stretched; None: as it falls.
    """

    shift: float
    sigmas: tuple[float, ...] | None = None
    last: float | None = None


def even_sigmas(steps: int) -> tuple[float, ...]:
    """1, 1 − 1/n, …, 1/n: `Grid.sigmas` of most pipelines that give their scheduler any."""
    return tuple(torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())


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

    @property
    def forwards(self) -> int:
        """Forwards that a prediction of one sample takes: 2 with the negative prompt's, else 1."""
        return 2 if self.pairs else 1

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


@dataclass(frozen=True)
class TextLimit:
    """What of a prompt is read.

    Attributes:
        reader: as a note calls what reads it.
        tokenizers: by their names in the pipeline; the one that makes most tokens of a prompt counts.
        tokens: most that are read; None: as many as the tokenizer says (`model_max_length`).
    """

    reader: str
    tokenizers: tuple[str, ...]
    tokens: int | None = None


class Family(ABC):
    """One family of models. Made for one model, from its configuration files alone.

    Args:
        architecture: of the model; what its files leave out is filled in from the classes' defaults.

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
        attention_names: kernels that its attention can be switched to, of those in `models/attention.py`; by default
            those of diffusers' dispatcher. ("native",) if its attention does not go through that.
        negatives_differ: whether a negative prompt is encoded otherwise than a prompt (`encode`).
        optional_parts: those of `text_parts` that a pipeline can do without.
        known_models: the models on the hub whose sizes are known without a download, by name.
        comfyui: whether ComfyUI maps diffusers' names of the layers in `lora_targets` to its own, so that it reads a
            LoRA as it is saved here.
    """

    title: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]]
    block_names: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...] | str]
    multiple: int = 16
    largest_side: int | None = None
    text_length: int = 512
    pads_to: ClassVar[int] = 0
    attention_names: ClassVar[tuple[str, ...]] = tuple(DISPATCHED)
    negatives_differ: ClassVar[bool] = False
    optional_parts: ClassVar[tuple[str, ...]] = ()
    known_models: ClassVar[Mapping[str, Callable[[], Architecture]]] = {}
    comfyui: ClassVar[bool] = False

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        # Files of earlier versions lack what these have added.
        self.architecture = replace(
            architecture,
            transformer=_with_defaults(self.transformer_class, architecture.transformer),
            vae=_with_defaults(self.vae_class, architecture.vae),
        )

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

    def build_transformer(self, config: Mapping[str, Any] | None = None) -> Any:
        """The transformer with diffusers' initial weights, on torch's default device, in its default dtype.

        Args:
            config: another one than the model's.
        """
        made = cast(Any, self.transformer_class).from_config(config or self.architecture.transformer)
        return attach(made, self)

    def build_vae(self) -> Any:
        """The autoencoder, as above."""
        return attach(cast(Any, self.vae_class).from_config(self.architecture.vae), self)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The transformer's blocks, in the order of a forward."""
        lists = (cast(nn.ModuleList, transformer.get_submodule(name)) for name in self.block_names)
        return [block for of_list in lists for block in of_list]

    @abstractmethod
    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        """A transformer's configuration with one block of each kind, and how many of each the whole one has, in the
        order of `blocks`. Blocks are of a kind if they save the same in a forward; with a LoRA the first saves less."""

    @property
    def lora_names(self) -> Mapping[str, Target]:
        """The transformer's layers by other names than diffusers', which files of LoRAs give them."""
        return {}

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

    def drop_unread(self, pipeline: Any) -> None:  # noqa: B027 - most read all of their text encoders
        """Takes out of text encoders, which will only be used by `encode`, what no prompt is read from."""

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

    def check_length(self, length: int) -> None:
        """Raises UserError if prompts cannot be encoded with this `rollout.max_sequence_length`."""
        if length == 0:
            raise UserError(
                "rollout.max_sequence_length 0: this model's text encoder needs tokens, as in "
                f"--rollout.max-sequence-length {self.text_length}"
            )

    def about_length(self, length: int) -> str:
        """What to say of this `rollout.max_sequence_length`; empty if nothing."""
        if self.pads_to or length == self.text_length:
            return ""
        return f"the model's own pipeline takes {self.text_length}, and its pictures depend on it"

    def text_limits(self, length: int) -> list[TextLimit]:
        """What of a prompt is read with this `rollout.max_sequence_length`, for a note on prompts that are longer. A
        template's own tokens are left out."""
        tokenizers = [part for part in self.text_parts if part.startswith("tokenizer")]
        return [TextLimit(self.title, tuple(tokenizers[-1:]), length)]

    def text_tokens(self, rows: Rows) -> int:
        """Text tokens of a forward, of one encoded prompt or of stacked ones; by default those of the first tensor."""
        return next(iter(rows.values())).shape[-2]

    # Forwards

    @property
    def rule(self) -> Rule | None:
        """`Guidance.rule` of guided predictions."""
        return self.guidance(GUIDED).rule

    @property
    def reads_negatives(self) -> bool:
        """Whether guidance, if it is on, predicts the negative prompt too."""
        return self.guidance(GUIDED).pairs

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
        """Has all blocks attend with the kernel `name`, one of `attention_names`."""
        if len(self.attention_names) > 1:
            transformer.set_attention_backend(DISPATCHED[name].value)

    @abstractmethod
    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        """Kinds of softmax attention in one forward of `batch` rows, largest first."""

    def joint_attention(
        self, batch: int, latent: tuple[int, ...], text_tokens: int, *, calls: int, text: int = 0
    ) -> AttentionShape:
        """`calls` over text and image tokens together, by the usual names in the transformer's configuration; `text`:
        how many of them come last, if text and image are still two sequences there."""
        config = self.architecture.transformer
        tokens = self.image_tokens(latent) + text_tokens
        return AttentionShape(batch, tokens, config["num_attention_heads"], config["attention_head_dim"], calls, text)


Module = TypeVar("Module", bound=nn.Module)


def attach(module: Module, family: Family) -> Module:
    """`module`, a transformer or an autoencoder, which carries its family from now on, and so do its copies."""
    module.dgpo_family = family  # type: ignore[assignment]
    return module


def family_of(module: nn.Module) -> Family:
    """The family that `module` carries. Raises LookupError if it was neither loaded nor built as a part of a model."""
    family = module.__dict__.get("dgpo_family")
    if family is None:
        raise LookupError(f"this {type(module).__name__} has no family: `attach` gives it one")
    return family


def _with_defaults(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **config}


def text_seed(text: str) -> int:
    """A seed that is a function of the text, the same in every process, for `Family.random_condition`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def random_tokens(text: str, length: int, width: int, std: float = 1.0) -> Tensor:
    """(length, width) normal numbers, fp32 on the CPU, a function of the text, for `Family.random_condition`."""
    return std * torch.randn(length, width, generator=torch.Generator().manual_seed(text_seed(text)))


def alike_between(config: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[int]]:
    """`Family.one_of_each_block` of one list of blocks that are all alike.

    The first and the last are kinds of their own: with LoRA, nothing before the first needs a gradient, and the text
    that the last one makes may be dropped.

    Args:
        config: of the transformer.
        name: of the number of blocks in it.
    """
    between = config[name] - 2
    counts = [1, between, 1] if between > 0 else [1] * config[name]
    return {**config, name: len(counts)}, counts


def rounded_up(number: int, multiple: int) -> int:
    """The next multiple, or `number` if it is one."""
    return -(-number // multiple) * multiple
