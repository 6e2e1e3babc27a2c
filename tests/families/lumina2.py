"""A small Lumina2."""

from functools import partial

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model

from tests.families.byte_tokenizer import DECODER_ONLY, byte_tokenizer
from tests.families.case import Case, fill
from tests.families.tiny_parts import quiet
from tests.families.z_image import VAE, draws

LENGTH = 288
"""The system prompt alone has 185 bytes."""
TRANSFORMER = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 48,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (300, 64, 64),
    "cap_feat_dim": 24,
}
ENCODER = {**DECODER_ONLY, "query_pre_attn_scalar": 12, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": None}


def make() -> Lumina2Pipeline:
    """The pipeline."""
    pipeline = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=False),
        vae=fill(AutoencoderKL(**VAE), 1),
        text_encoder=fill(Gemma2Model(Gemma2Config(**ENCODER)), 2),
        tokenizer=byte_tokenizer((), begin="<bos>"),
        transformer=fill(Lumina2Transformer2DModel(**TRANSFORMER), 3),
    )
    return quiet(pipeline)


CASE = Case(
    name="lumina2",
    make=make,
    family="dgpo_fast.models.families.lumina2:Lumina2",
    pipeline_draws=partial(draws, max_sequence_length=LENGTH),
    size=(64, 96),
    length=LENGTH,
)
