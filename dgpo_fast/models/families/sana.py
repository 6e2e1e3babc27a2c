"""SANA, 1.0 and 1.5: linear attention over the image's tokens, and attention from them to the text. Gemma 2 encodes it.

Pictures are those of diffusers' pipeline without its resolution binning, which draws the nearest of its own sizes and
scales the picture. Texts of a batch are padded to one length, and a mask hides the padding.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Config

from dgpo_fast.models.architecture import Architecture
from dgpo_fast.models.families.packing import UnpackedLatents
from dgpo_fast.models.families.padding import padded_with_mask
from dgpo_fast.models.family import AttentionShape, Rows, alike_between, random_tokens

INSTRUCTION: list[str] = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What stands before a prompt in the text encoder, unless it is a negative one."""


class Sana(UnpackedLatents):
    """SANA."""

    title = "SANA"
    text_parts = ("text_encoder", "tokenizer")
    block_names = ("transformer_blocks",)
    lora_targets = tuple(
        f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")
    )
    multiple = 32
    text_length = 300
    pads_to = 64
    attention_names = ("native",)
    negatives_differ = True
    pipeline_class = SanaPipeline
    transformer_class = SanaTransformer2DModel
    vae_class = AutoencoderDC

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.pixels = 2 ** (len(self.architecture.vae["encoder_block_out_channels"]) - 1)

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        return alike_between(self.architecture.transformer, "num_layers")

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        scaled = latents / vae.config.scaling_factor
        return vae.decode(scaled.to(next(vae.decoder.parameters()).dtype), return_dict=False)[0].float()

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(next(vae.encoder.parameters()).dtype)).latent.float() * vae.config.scaling_factor

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        rows, mask, _, _ = pipeline.encode_prompt(
            text,
            device=pipeline.transformer.device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            complex_human_instruction=None if negative else INSTRUCTION,
        )
        return {"text": rows[0][mask[0].bool()]}

    def random_condition(self, text: str, length: int) -> Rows:
        return {"text": random_tokens(text, length, self.architecture.transformer["caption_channels"])}

    def stack(self, rows: Sequence[Rows], tokens: int) -> Rows:
        return padded_with_mask(rows, tokens)

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        text = condition["text"]
        velocity = transformer(
            hidden_states=x_t.to(text.dtype),
            encoder_hidden_states=text,
            encoder_attention_mask=condition["mask"],
            timestep=timestep * self.architecture.transformer["timestep_scale"],
            return_dict=False,
        )[0]
        # Some predict a variance behind the velocity.
        return velocity[:, : x_t.shape[1]]

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        config = self.architecture.transformer
        # Its queries are the image's tokens alone, its keys the text's.
        return (
            AttentionShape(
                batch=batch,
                tokens=self.image_tokens(latent),
                heads=config["num_cross_attention_heads"],
                head_dim=config["cross_attention_head_dim"],
                calls=config["num_layers"],
            ),
        )


def published(name: str, changed: Mapping[str, Any]) -> Architecture:
    """SANA with 1.60 B weights at 1024 × 1024 pixels, but for what is `changed` in its transformer.

    Sizes and scheduler are those of diffusers' convert_sana_to_diffusers.py. The autoencoder is the one that
    convert_dcae_to_diffusers.py calls dc-ae-f32c32-sana-1.0, and Gemma-2-2b has the defaults of its class.
    """
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return Architecture(
        index={
            "_class_name": "SanaPipeline",
            "text_encoder": ("transformers", "Gemma2Model"),
            "tokenizer": ("transformers", "GemmaTokenizer"),
        },
        transformer=changed,
        vae={
            "encoder_block_types": blocks,
            "decoder_block_types": blocks,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
        text_encoders={"text_encoder": Gemma2Config()},
        scheduler={
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
        name=name,
    )


_SMALL = {
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "num_layers": 28,
}
_NORMED = {"qk_norm": "rms_norm_across_heads"}
_CHANGED: Mapping[str, Mapping[str, Any]] = {
    "Efficient-Large-Model/Sana_600M_512px_diffusers": {**_SMALL, "sample_size": 16},
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": _SMALL,
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": {"sample_size": 16},
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": {},
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": {},
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": _NORMED,
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": {**_NORMED, "num_layers": 60},
}
Sana.known_models = {name: partial(published, name, changed) for name, changed in _CHANGED.items()}
