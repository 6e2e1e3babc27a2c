"""Small random parts that pipelines of several families have: text encoders, tokenizers of letters, an autoencoder."""

from typing import Any

from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.families.case import fill

LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
CLIP_PIECES = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
T5_PIECES = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
CLIP_LENGTH = 77
FACTOR = 2
"""Pixels along each side of a number of the autoencoder's latents."""


def autoencoder(channels: int, **more: Any) -> AutoencoderKL:
    """With latents of `channels`, whose sides are those of the picture / `FACTOR`."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    )
    return fill(vae, seed=1)


def t5(width: int, multilingual: bool = False) -> PreTrainedModel:
    """T5's encoder, or UMT5's."""
    sizes = {"vocab_size": len(T5_PIECES), "d_model": width, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    model = (
        UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes))
        if multilingual
        else T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))
    )
    return fill(model, seed=2)


def t5_tokenizer() -> T5TokenizerFast:
    """A token a letter."""
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(T5_PIECES)], extra_ids=0)


def clip(width: int) -> CLIPTextModel:
    """CLIP's text encoder, without a projection."""
    config = CLIPTextConfig(
        vocab_size=len(CLIP_PIECES),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=width,
        bos_token_id=len(CLIP_PIECES) - 2,
        eos_token_id=len(CLIP_PIECES) - 1,
    )
    return fill(CLIPTextModel(config), seed=3)


def clip_tokenizer() -> CLIPTokenizer:
    """A token a letter."""
    vocabulary = {piece: rank for rank, piece in enumerate(CLIP_PIECES)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_LENGTH)


def quiet(pipeline: Any) -> Any:
    """`pipeline`, which shows no progress, and whose pixels are those of the decoder, not cut to [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    factor = pipeline.image_processor.config.vae_scale_factor
    pipeline.image_processor = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False)
    return pipeline


def drawn(pipeline: Any, latents: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """What `pipeline` draws from noise `latents`, both in its own form: latents, and the decoder's pixels."""
    last = {}

    def keep(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(tensors)
        return {}

    pixels = pipeline(latents=latents, output_type="pt", callback_on_step_end=keep, **options).images
    return last["latents"], pixels


def drawn_packed(pipeline: Any, noise: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`drawn` by a pipeline that packs patches of 2 × 2: noise and latents (1, C, H, W) here."""
    height, width = (pipeline.vae_scale_factor * side for side in noise.shape[-2:])
    packed = pipeline._pack_latents(noise, *noise.shape)
    latents, pixels = drawn(pipeline, packed, height=height, width=width, **options)
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor), pixels
