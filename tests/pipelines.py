"""Untrained pipelines that have everything SD3.5-Medium has, at a size that a test can afford."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_TOKENS = 12


def save_random_pipeline(folder: Path, seed: int = 0) -> None:
    """Writes a `StableDiffusion3Pipeline` folder: three text encoders, 16 latent channels, dual attention, RMS-normed
    QK."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    _randomise(transformer)
    clips = [_clip(), _clip()]
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=48, d_kv=8, d_ff=64, num_layers=1, num_heads=2)).eval()
    StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=clips[0],
        tokenizer=_clip_tokenizer(folder / "build"),
        text_encoder_2=clips[1],
        tokenizer_2=_clip_tokenizer(folder / "build"),
        text_encoder_3=t5,
        tokenizer_3=_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)


def _randomise(transformer: SD3Transformer2DModel) -> None:
    """Gives weights that training would have moved off zero a size at which every input matters to the output."""
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)


def _clip() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=16,
        bos_token_id=len(_clip_vocabulary()) - 2,
        eos_token_id=len(_clip_vocabulary()) - 1,
    )
    return CLIPTextModelWithProjection(config).eval()


def _clip_vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_clip_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_TOKENS)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)
