"""A small random pipeline of SANA. Its tokenizer has a token for each letter."""

from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.families.case import Case, fill
from tests.families.tiny_parts import drawn

WIDTH, CHANNELS, FACTOR = 32, 4, 4
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]


def make(seed: int = 0) -> SanaPipeline:
    """The pipeline. It predicts a variance too, scales its time, and has a factor of 4 between pixels and latents."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=16,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.5,
    )
    blocks, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    vae = AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    encoder = Gemma2Config(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    return SanaPipeline(
        transformer=fill(transformer, seed),
        vae=fill(vae, seed),
        text_encoder=fill(Gemma2Model(encoder), seed),
        tokenizer=_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
    )


def pipeline_draws(
    pipeline: Any, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """As `Case.pipeline_draws`."""
    height, width = (FACTOR * side for side in noise.shape[2:])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.image_processor.register_to_config(do_normalize=False)  # else it cuts pixels off at −1 and 1
    options = {"negative_prompt": negative, "guidance_scale": scale, "num_inference_steps": steps}
    size = {"height": height, "width": width, "use_resolution_binning": False}
    return drawn(pipeline, noise, prompt=prompt, **options, **size)


def _tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {piece: number for number, piece in enumerate([*special, "▁", "\n", *LETTERS])}
    return GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)


CASE = Case(
    name="sana",
    make=make,
    family="dgpo_fast.models.families.sana:Sana",
    pipeline_draws=pipeline_draws,
    size=(64, 96),
    solver="dpmpp_2m",
    length=300,
)
