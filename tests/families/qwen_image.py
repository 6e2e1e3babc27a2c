"""A small random pipeline of Qwen-Image. Its tokenizer has a token for each byte."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.families.case import Case, fill
from tests.families.tiny_parts import drawn_packed

WIDTH, CHANNELS = 32, 4
VOCABULARY = 300


def make(seed: int = 0) -> QwenImagePipeline:
    """The pipeline, with a factor of 4 between pixels and latents."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=torch.randn(CHANNELS, generator=generator).tolist(),
        latents_std=(torch.rand(CHANNELS, generator=generator) + 0.5).tolist(),
    )
    return QwenImagePipeline(
        transformer=fill(transformer, seed),
        vae=fill(vae, seed),
        text_encoder=fill(_text_encoder(), seed),
        tokenizer=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
    )


def pipeline_draws(
    pipeline: Any, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """As `Case.pipeline_draws`."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"negative_prompt": negative, "true_cfg_scale": scale, "num_inference_steps": steps}
    latents, pixels = drawn_packed(pipeline, noise, prompt=prompt, **options)
    return latents[:, :, 0], 2 * pixels - 1


def _text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": (0,),
    }
    # Tokens of pictures must be in the vocabulary, though no prompt has one.
    pictures = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    numbers = {name: VOCABULARY - 1 - index for index, name in enumerate(pictures)}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **numbers))


def _tokenizer() -> Qwen2Tokenizer:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


CASE = Case(
    name="qwen_image",
    make=make,
    family="dgpo_fast.models.families.qwen_image:QwenImage",
    pipeline_draws=pipeline_draws,
    size=(32, 48),
    steps=(2, 4, 8),  # the stretch of its grid divides by 0 at 1 step
)
