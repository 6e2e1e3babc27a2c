"""A small CogView4."""

from typing import Any

from diffusers import AutoencoderKL, CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor
from torch import Tensor
from transformers import GlmConfig, GlmModel

from tests.families.byte_tokenizer import DECODER_ONLY, byte_tokenizer
from tests.families.case import Case, fill
from tests.families.tiny_parts import quiet
from tests.families.z_image import VAE, draws

LENGTH = 96
TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "sample_size": 8,
    "rope_axes_dim": (16, 16),
}
ENCODER = {**DECODER_ONLY, "pad_token_id": 256, "eos_token_id": [256]}


def make() -> CogView4Pipeline:
    """The pipeline, whose tokenizer pads on the left."""
    pipeline = CogView4Pipeline(
        tokenizer=byte_tokenizer((), begin="<sop>", padding_side="left"),
        text_encoder=fill(GlmModel(GlmConfig(**ENCODER)), 2),
        vae=fill(AutoencoderKL(**{**VAE, "scaling_factor": 1.0, "shift_factor": None}), 1),
        transformer=fill(CogView4Transformer2DModel(**TRANSFORMER), 3),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )
    return quiet(pipeline)


def pipeline_draws(
    pipeline: Any, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """See `Case.pipeline_draws`; with the pipeline's own attention."""
    for block in pipeline.transformer.transformer_blocks:
        block.attn1.set_processor(CogView4AttnProcessor())
    return draws(pipeline, noise, prompt, negative, scale, steps, max_sequence_length=LENGTH)


CASE = Case(
    name="cogview4",
    make=make,
    family="dgpo_fast.models.families.cogview4:CogView4",
    pipeline_draws=pipeline_draws,
    size=(64, 96),
    length=LENGTH,
)
