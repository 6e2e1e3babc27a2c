"""A small Z-Image."""

from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from tests.families.byte_tokenizer import CHATML, DECODER_ONLY, byte_tokenizer
from tests.families.case import Case, fill
from tests.families.tiny_parts import drawn, quiet

VAE = {
    "latent_channels": 4,
    "block_out_channels": (4, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 64,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""A small FLUX.1 autoencoder of its factor, 8."""
TRANSFORMER = {
    "in_channels": 4,
    "dim": 32,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "cap_feat_dim": 24,
    "axes_dims": [8, 4, 4],
    "axes_lens": [1024, 64, 64],
}


def make(shift: float = 6.0) -> ZImagePipeline:
    """The pipeline; a `shift` of 3 is Turbo's."""
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
        vae=fill(AutoencoderKL(**VAE), 1),
        text_encoder=fill(Qwen3Model(Qwen3Config(**DECODER_ONLY)), 2),
        tokenizer=byte_tokenizer(template=CHATML),
        transformer=fill(ZImageTransformer2DModel(**TRANSFORMER), 3),
    )
    return quiet(pipeline)


def draws(
    pipeline: Any, noise: Tensor, prompt: str, negative: str, scale: float, steps: int, **options: object
) -> tuple[Tensor, Tensor]:
    """See `Case.pipeline_draws`."""
    height, width = (pipeline.vae_scale_factor * side for side in noise.shape[2:])
    return drawn(
        pipeline,
        noise.clone(),
        prompt=[prompt],
        negative_prompt=[negative],
        height=height,
        width=width,
        guidance_scale=scale,
        num_inference_steps=steps,
        **options,
    )


CASE = Case(
    name="z_image",
    make=make,
    family="dgpo_fast.models.families.z_image:ZImage",
    pipeline_draws=draws,
    size=(64, 96),
    scales={"guided": 4.0, "barely guided": 0.5, "unguided": 0.0},
)
