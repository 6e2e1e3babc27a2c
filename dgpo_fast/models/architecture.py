"""What a Stable Diffusion 3 pipeline is made of, read from its configuration files alone: no weight is loaded.

Sizes, parameter counts and memory follow from this before anything is allocated: modules built under
`torch.device("meta")` have shapes and no storage.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CLIP_TOKENS = 77
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True)
class Architecture:
    """The configurations of a pipeline's modules.

    Attributes:
        transformer: of diffusers' `SD3Transformer2DModel`.
        vae: of diffusers' `AutoencoderKL`.
        text_encoders: those that the pipeline has, by their name in it.
        clip_tokens: length of the CLIP encoders' part of a prompt's embedding.
        scheduler: of the pipeline's scheduler.
        folder: where the files are; None for the one known without files.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: Mapping[str, CLIPTextConfig | T5Config] = field(default_factory=dict)
    clip_tokens: int = CLIP_TOKENS
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that its files name: the transformer's sample_size × the decoder's factor."""
        side = self.transformer["sample_size"] * 2 ** (len(self.vae["block_out_channels"]) - 1)
        return side, side

    @property
    def shift(self) -> Any:
        """Timestep shift of its scheduler, as its file has it; 1 if it names none, as in diffusers."""
        return self.scheduler.get("shift", self.scheduler.get("flow_shift", 1.0))

    @property
    def scheduler_file(self) -> Path:
        """Where `scheduler` is from."""
        return (self.folder or Path()) / SCHEDULER_FILE

    def build_transformer(self) -> SD3Transformer2DModel:
        """The transformer with diffusers' initial weights, on torch's default device, in its default dtype."""
        return SD3Transformer2DModel.from_config(self.transformer)

    def build_vae(self) -> AutoencoderKL:
        """The autoencoder, as above."""
        return AutoencoderKL.from_config(self.vae)

    def build_text_encoder(self, name: str) -> nn.Module:
        """The text encoder called `name`, as above."""
        config = self.text_encoders[name]
        return T5EncoderModel(config) if isinstance(config, T5Config) else CLIPTextModelWithProjection(config)


def sd35_medium() -> Architecture:
    """Stable Diffusion 3.5-Medium: 2.24 B weights in 24 layers, the first 13 with a second attention."""
    clip = {"vocab_size": 49408, "max_position_embeddings": CLIP_TOKENS, "bos_token_id": 49406, "eos_token_id": 49407}
    return Architecture(
        transformer={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        vae={
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "sample_size": 1024,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "force_upcast": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        },
        text_encoders={
            "text_encoder": CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
                hidden_act="quick_gelu",
                **clip,
            ),
            "text_encoder_2": CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
                hidden_act="gelu",
                **clip,
            ),
            "text_encoder_3": T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            ),
        },
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    )


def read_architecture(folder: Path) -> Architecture:
    """The architecture of the pipeline in `folder`. Raises UserError naming a file that is missing or damaged."""
    index = _read(folder / "model_index.json")
    present = [name for name in TEXT_ENCODERS if index.get(name, [None])[0] is not None]
    kinds = {"T5EncoderModel": T5Config, "CLIPTextModelWithProjection": CLIPTextConfig}
    encoders = {}
    for name in present:
        kind = index[name][1]
        if kind not in kinds:
            raise UserError(f"{folder / 'model_index.json'}: {name} is a {kind}; known are {', '.join(kinds)}")
        encoders[name] = kinds[kind].from_dict(_read(folder / name / "config.json"))
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    length = _read(tokenizer).get("model_max_length", CLIP_TOKENS) if tokenizer.is_file() else CLIP_TOKENS
    return Architecture(
        transformer=_read(folder / "transformer" / "config.json"),
        vae=_read(folder / "vae" / "config.json"),
        text_encoders=encoders,
        clip_tokens=length,
        scheduler=_read(folder / SCHEDULER_FILE),
        folder=folder,
    )


def _read(path: Path) -> JsonObject:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the pipeline's folder is not whole") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; the pipeline's folder is damaged")
    return value
