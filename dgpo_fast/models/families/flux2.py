"""FLUX.2: klein, its base and its step-distilled models, in two sizes, and dev.

The latent outside is (128, height / 16, width / 16): the autoencoder's 32 channels in patches of 2 × 2, normalised by
the running statistics of its batch norm. One token is one patch. Text stands before the image and has a fixed number of
tokens, 512 in the pipelines: the transformer gets no mask, so what stands at the padding acts too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from transformers import Mistral3Config, PretrainedConfig, Qwen3Config

from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.families.packing import DEFAULT_LATENT_SIDE, PATCH, shift_of_mu
from dgpo_fast.models.family import AttentionShape, Family, Grid, Guidance, Rows, even_sigmas, random_tokens

LORA_TARGETS = (
    r"transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
"""Whole names: `attn.to_out` is a linear layer in single blocks, and a list that begins with one in the others."""


class _Flux2(Family):
    """What klein and dev share."""

    text_parts = ("text_encoder", "tokenizer")
    block_names = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = LORA_TARGETS
    comfyui = True
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    text_layers: ClassVar[tuple[int, ...]]
    """Layers of the text encoder whose outputs are joined, counted from 1: those after the last are not needed."""

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.multiple = PATCH * 2 ** (len(self.architecture.vae["block_out_channels"]) - 1)

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        config = dict(self.architecture.transformer)
        # Nothing before the first block needs a gradient with LoRA, so it saves less than the next.
        later = config["num_layers"] - 1
        counts = [1, *([later] if later else []), config["num_single_layers"]]
        return {**config, "num_layers": len(counts) - 1, "num_single_layers": 1}, counts

    @property
    def size(self) -> tuple[int, int]:
        side = DEFAULT_LATENT_SIDE * self.multiple // PATCH
        return side, side

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.architecture.transformer["in_channels"], height // self.multiple, width // self.multiple

    def image_tokens(self, latent: tuple[int, ...]) -> int:
        return latent[1] * latent[2]

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        own: Any = vae
        mean, std = _statistics(own)
        scaled = F.pixel_shuffle(latents * std + mean, PATCH)
        return own.decode(scaled.to(next(own.decoder.parameters()).dtype), return_dict=False)[0].float()

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        own: Any = vae
        mean, std = _statistics(own)
        encoded = own.encode(pixels.to(next(own.encoder.parameters()).dtype)).latent_dist.mode()
        return (F.pixel_unshuffle(encoded.float(), PATCH) - mean) / std

    def grid(self, steps: int, latent: tuple[int, ...]) -> Grid:
        scheduler = self.architecture.scheduler
        if not scheduler.get("use_dynamic_shifting"):
            return Grid(self.architecture.shift, sigmas=even_sigmas(steps))
        mu = compute_empirical_mu(self.image_tokens(latent), steps)
        return Grid(shift_of_mu(scheduler, mu), sigmas=even_sigmas(steps))

    def random_condition(self, text: str, length: int) -> Rows:
        return {"text": random_tokens(text, length, self.architecture.transformer["joint_attention_dim"])}

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        text, (height, width) = condition["text"], x_t.shape[-2:]
        tokens = transformer(
            hidden_states=x_t.flatten(2).transpose(1, 2).to(text.dtype),
            encoder_hidden_states=text,
            timestep=timestep / 1000,
            img_ids=_positions((1, height, width, 1), x_t.device),
            txt_ids=_positions((1, 1, 1, text.shape[1]), x_t.device),
            guidance=embedded,
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        config = self.architecture.transformer
        calls = config["num_layers"] + config["num_single_layers"]
        return (self.joint_attention(batch, latent, text_tokens, calls=calls),)

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        with _cut_after(self.text_layers[-1], pipeline.text_encoder):
            rows, _ = pipeline.encode_prompt(
                text,
                device=pipeline.transformer.device,
                max_sequence_length=length,
                text_encoder_out_layers=self.text_layers,
            )
        return {"text": rows[0]}

    def drop_unread(self, pipeline: Any) -> None:
        del pipeline.text_encoder.get_decoder().layers[self.text_layers[-1] :]
        pipeline.text_encoder.lm_head = nn.Identity()


class Flux2Klein(_Flux2):
    """FLUX.2-klein, 4B or 9B: base, guided against the empty prompt, or distilled to a few steps without guidance."""

    title = "FLUX.2-klein"
    text_layers = (9, 18, 27)
    pipeline_class = Flux2KleinPipeline
    negatives_differ = True

    @property
    def distilled(self) -> bool:
        # Both kinds of transformers have the same configuration: the pipeline's alone tells.
        return bool(self.architecture.index.get("is_distilled", False))

    @property
    def notes(self) -> tuple[str, ...]:
        if self.distilled:
            return (f"this {self.title} is distilled to a few steps: guidance_scale and negative prompts are not used",)
        return (f"{self.title} knows no negative prompts: guidance is always against the empty prompt",)

    def guidance(self, scale: float) -> Guidance:
        return Guidance(1.0) if self.distilled else super().guidance(scale)

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        return super().encode(pipeline, "" if negative else text, length, negative=negative)


class Flux2(_Flux2):
    """FLUX.2-dev, which is distilled from guidance: it reads the scale as a number."""

    title = "FLUX.2-dev"
    text_layers = (10, 20, 30)
    pipeline_class = Flux2Pipeline

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{self.title} reads guidance_scale as a number, in one forward a step: negative prompts are not used",)

    def guidance(self, scale: float) -> Guidance:
        return Guidance(1.0, embedded=scale)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels of patches, (C, 1, 1), in fp32."""
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    return mean.view(-1, 1, 1), (variance + vae.config.batch_norm_eps).sqrt().view(-1, 1, 1)


def _positions(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(N, 4) positions in time, height, width and text of the N points of a grid of `counts`, the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in counts))


@contextmanager
def _cut_after(layer: int, encoder: Any) -> Iterator[None]:
    """Has a language model end with the given layer, whose output is not normed then, nor made to words."""
    decoder = encoder.get_decoder()
    # All layers stay in their list: transformers hooks those that it finds there at the first call, for good.
    cut = (
        (decoder.config, "num_hidden_layers", layer),
        (decoder, "norm", nn.Identity()),
        (encoder, "lm_head", nn.Identity()),
    )
    whole = [(owner, name, getattr(owner, name)) for owner, name, _ in cut]
    try:
        for owner, name, value in cut:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in whole:
            setattr(owner, name, value)


def _klein(name: str, *, sizes: tuple[int, int, int], encoder: PretrainedConfig) -> Architecture:
    """klein with `sizes` double blocks, single blocks and heads: 3.88 B weights with Qwen3-4B, 9.08 B with Qwen3-8B.

    These numbers are those of diffusers' convert_flux2_to_diffusers.py, all others its class's defaults. The widths of
    the text encoders follow from what the transformer reads; their other sizes give their published numbers of weights.
    """
    transformer = {
        **dict(zip(("num_layers", "num_single_layers", "num_attention_heads"), sizes, strict=True)),
        "joint_attention_dim": 3 * encoder.hidden_size,
        "guidance_embeds": False,
    }
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": "base" not in name}
    return _published(name, index, transformer, "Qwen3ForCausalLM", encoder)


def _dev(name: str) -> Architecture:
    """dev: 32.22 B weights with Mistral-Small-3.2-24B. Both are the defaults of their classes in diffusers and
    transformers, but for the encoder's output head, which has weights of its own."""
    index = {"_class_name": "Flux2Pipeline"}
    encoder = Mistral3Config(tie_word_embeddings=False)
    return _published(name, index, {}, "Mistral3ForConditionalGeneration", encoder)


def _published(
    name: str, index: dict[str, Any], transformer: dict[str, Any], kind: str, encoder: PretrainedConfig
) -> Architecture:
    """The autoencoder is diffusers' class with its defaults, and the scheduler FLUX.1-dev's, as the conversion script
    has it: the pipelines compute the shift."""
    return Architecture(
        transformer=transformer,
        vae={},
        index={**index, "text_encoder": ["transformers", kind]},
        text_encoders={"text_encoder": encoder},
        scheduler=flow_match_scheduler(3.0, use_dynamic_shifting=True),
        name=f"black-forest-labs/FLUX.2-{name}",
    )


def qwen3_4b() -> Qwen3Config:
    """Qwen3-4B: 4.02 B weights."""
    return _qwen3(2560, 9728, tied=True)


def _qwen3(width: int, intermediate: int, *, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )


def _klein_4b(name: str) -> Architecture:
    return _klein(name, sizes=(5, 20, 24), encoder=qwen3_4b())


def _klein_9b(name: str) -> Architecture:
    return _klein(name, sizes=(8, 24, 32), encoder=_qwen3(4096, 12288, tied=False))


Flux2Klein.known_models = {
    f"black-forest-labs/FLUX.2-{name}": partial(make, name)
    for name, make in (
        ("klein-base-4B", _klein_4b),
        ("klein-4B", _klein_4b),
        ("klein-base-9B", _klein_9b),
        ("klein-9B", _klein_9b),
    )
}
Flux2.known_models = {"black-forest-labs/FLUX.2-dev": partial(_dev, "dev")}
