"""Stable Diffusion 3: SD3-Medium, SD3.5-Medium, -Large and -Large-Turbo.

Sizes of the known models are those of diffusers' `scripts/convert_sd3_to_diffusers.py` and of its classes' defaults, in
agreement with the published numbers of parameters; no published configuration was read.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, T5Config

from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.attention import DISPATCHED, MATMUL
from dgpo_fast.models.families import autoencoder_kl
from dgpo_fast.models.families.autoencoder_kl import KLLatents
from dgpo_fast.models.families.sd3_attention import JointAttention
from dgpo_fast.models.families.sd3_lora_names import original_names
from dgpo_fast.models.family import AttentionShape, Rows, TextLimit, text_seed
from dgpo_fast.models.lora_names import Target

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
CLIP_TOKENS = 77
CLIP_STD, T5_STD = 1.0, 0.2
"""Of the trained encoders' outputs, about."""
T5 = "text_encoder_3"
ATTENTION_LAYERS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""Linear layers of attention over image and text together, by the ends of their names."""


class SD3(KLLatents):
    """See the module."""

    title = "Stable Diffusion 3"
    text_parts = ("text_encoder", "text_encoder_2", T5, "tokenizer", "tokenizer_2", "tokenizer_3")
    optional_parts = (T5, "tokenizer_3")
    block_names = ("transformer_blocks",)
    lora_targets = ATTENTION_LAYERS
    comfyui = True
    text_length = 256
    attention_names = (*DISPATCHED, MATMUL)
    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.largest_side = self.multiple * architecture.transformer["pos_embed_max_size"]
        self.clip_tokens = architecture.token_limits.get("tokenizer", CLIP_TOKENS)

    @property
    def distilled(self) -> bool:
        """By the model's name alone: the configuration of a Turbo is that of the model it was made from."""
        names = (self.architecture.name, str(self.architecture.index.get("_name_or_path", "")))
        return any("turbo" in re.split(r"[^a-z0-9]+", name.lower()) for name in names)

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        """See `Family.one_of_each_block`."""
        config = self.architecture.transformer
        layers, dual = config["num_layers"], set(config.get("dual_attention_layers", ()))
        # Nothing before the first block needs a gradient with LoRA, so it saves less than the next.
        kinds = [(index in dual, index == 0, index == layers - 1) for index in range(layers)]
        unique = list(dict.fromkeys(kinds))
        dual_attention_layers = tuple(index for index, kind in enumerate(unique) if kind[0])
        small = {**config, "num_layers": len(unique), "dual_attention_layers": dual_attention_layers}
        return small, [kinds.count(kind) for kind in unique]

    @property
    def lora_names(self) -> Mapping[str, Target]:
        """See `Family.lora_names`."""
        return dict(original_names(self.architecture.transformer["num_layers"]))

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        """Tokens of CLIP, then `length` of T5 (zeros if there is no T5), and the pooled outputs of the CLIPs."""
        prompt, _, pooled, _ = pipeline.encode_prompt(
            text,
            text,
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=pipeline.transformer.device,
        )
        return {"prompt": prompt[0], "pooled": pooled[0]}

    def random_condition(self, text: str, length: int) -> Rows:
        """See `Family.random_condition`."""
        config = self.architecture.transformer
        generator = torch.Generator().manual_seed(text_seed(text))
        clip = CLIP_STD * torch.randn(self.clip_tokens, config["joint_attention_dim"], generator=generator)
        t5 = T5_STD * torch.randn(length, config["joint_attention_dim"], generator=generator)
        pooled = torch.randn(config["pooled_projection_dim"], generator=generator)
        return {"prompt": torch.cat([clip, t5]), "pooled": pooled}

    def check_length(self, length: int) -> None:
        """See `Family.check_length`."""
        if length == 0 and T5 in self.architecture.text_encoders:
            raise UserError(
                "rollout.max_sequence_length 0: this pipeline has a T5 encoder; give it tokens, as in "
                "--rollout.max-sequence-length 128"
            )

    def about_length(self, length: int) -> str:
        """See `Family.about_length`."""
        if length == 0 or T5 in self.architecture.text_encoders:
            return ""
        return "this model has no T5 encoder; zeros stand for its tokens, as in diffusers (0 leaves them out)"

    def text_limits(self, length: int) -> list[TextLimit]:
        """See `Family.text_limits`."""
        clip = TextLimit("CLIP", ("tokenizer", "tokenizer_2"))
        return [clip, TextLimit("T5", ("tokenizer_3",), length)] if T5 in self.architecture.text_encoders else [clip]

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        """See `Family.velocity`."""
        return transformer(
            hidden_states=x_t.to(condition["prompt"].dtype),
            timestep=timestep,
            encoder_hidden_states=condition["prompt"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]

    def set_attention(self, transformer: Any, name: str) -> None:
        """See `Family.set_attention`."""
        processor = JointAttention(name)
        for module in transformer.modules():
            if isinstance(module, Attention):
                module.set_processor(processor)

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        """Over image and text together, and over the image alone."""
        config = self.architecture.transformer
        dual = len(config.get("dual_attention_layers", ()))
        joint = self.joint_attention(batch, latent, text_tokens, calls=config["num_layers"], text=text_tokens)
        return (joint, self.joint_attention(batch, latent, 0, calls=dual)) if dual else (joint,)


def sd35_medium() -> Architecture:
    """SD3.5-Medium: 2.24 B weights in 24 layers, the first 13 with a second attention."""
    return _model(SD35_MEDIUM, layers=24, positions=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")


def _model(name: str, *, layers: int, positions: int, **transformer: Any) -> Architecture:
    """A model of `layers` layers, each of as many heads of 64."""
    return Architecture(
        index=_index(),
        transformer={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": layers,
            "attention_head_dim": 64,
            "num_attention_heads": layers,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * layers,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": positions,
            **transformer,
        },
        vae={
            **autoencoder_kl.PUBLISHED,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        text_encoders={
            "text_encoder": clip_l(),
            "text_encoder_2": _clip(1280, layers=32, heads=20, hidden_act="gelu"),
            T5: t5_xxl(),
        },
        scheduler=flow_match_scheduler(3.0),
        name=name,
    )


def _index() -> Mapping[str, Any]:
    clip, t5 = "CLIPTextModelWithProjection", "T5EncoderModel"
    classes = {"text_encoder": clip, "text_encoder_2": clip, T5: t5}
    tokenizers = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"}
    parts = {name: ["transformers", kind] for name, kind in {**classes, **tokenizers}.items()}
    return {"_class_name": "StableDiffusion3Pipeline", **parts}


def clip_l() -> CLIPTextConfig:
    """The text half of CLIP-L."""
    return _clip(768, layers=12, heads=12, hidden_act="quick_gelu")


def _clip(width: int, *, layers: int, heads: int, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=hidden_act,
        vocab_size=49408,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def t5_xxl() -> T5Config:
    """T5-v1.1-XXL."""
    return T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )


_LARGE = partial(_model, layers=38, positions=192, qk_norm="rms_norm")
SD3.known_models = {
    "stabilityai/stable-diffusion-3-medium-diffusers": partial(
        _model, "stabilityai/stable-diffusion-3-medium-diffusers", layers=24, positions=192
    ),
    SD35_MEDIUM: sd35_medium,
    **{
        name: partial(_LARGE, name)
        for name in ("stabilityai/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3.5-large-turbo")
    },
}
