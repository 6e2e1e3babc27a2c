"""Qwen-Image and Qwen-Image-2512, whose text encoder is Qwen2.5-VL.

A latent is (16, height / 8, width / 8), a token a patch of 2 × 2 of it. Text tokens stand before the image's: those
behind the first 34 of the prompt in its template, whose end is among them.

A batch's texts are padded to one length, and a mask hides the padding. It is there even if nothing is padded, so that
compiled blocks and graphs stay as they are when prompts change. Attention kernels that take no mask are out for that:
torch's own attends.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig

from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.families.calling import called
from dgpo_fast.models.families.packing import PATCH, PackedLatents, shift_by_size
from dgpo_fast.models.families.padding import padded_with_mask
from dgpo_fast.models.families.sd3 import ATTENTION_LAYERS
from dgpo_fast.models.family import AttentionShape, Grid, Guidance, Rows, alike_between, even_sigmas, random_tokens


class QwenImage(PackedLatents):
    """Qwen-Image."""

    title = "Qwen-Image"
    text_parts = ("text_encoder", "tokenizer")
    block_names = ("transformer_blocks",)
    lora_targets = (
        *ATTENTION_LAYERS,
        *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
    )
    comfyui = True
    pads_to = 64
    attention_names = ("native",)
    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.pixels = 2 ** len(self.architecture.vae["temperal_downsample"])
        self.multiple = PATCH * self.pixels

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "Qwen-Image is guided against the negative prompt, the empty one if a prompt has none; without a negative "
            "prompt, diffusers' own pipeline does not guide",
        )

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        return alike_between(self.architecture.transformer, "num_layers")

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents.device)
        # The autoencoder is one of videos: a picture is one frame.
        frames = (latents * std + mean)[:, :, None]
        return vae.decode(frames.to(next(vae.decoder.parameters()).dtype), return_dict=False)[0][:, :, 0].float()

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        mean, std = _statistics(vae, pixels.device)
        encoded = vae.encode(pixels[:, :, None].to(next(vae.encoder.parameters()).dtype)).latent_dist.mode()
        return (encoded[:, :, 0].float() - mean) / std

    def grid(self, steps: int, latent: tuple[int, ...]) -> Grid:
        scheduler, shift = self.architecture.scheduler, self.architecture.shift
        if scheduler.get("use_dynamic_shifting"):
            shift = shift_by_size(scheduler, self.image_tokens(latent))
        return Grid(shift, sigmas=even_sigmas(steps), last=scheduler.get("shift_terminal"))

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        device = pipeline.transformer.device
        rows, _ = pipeline.encode_prompt(text, device=device, max_sequence_length=length)
        return {"text": rows[0]}

    def random_condition(self, text: str, length: int) -> Rows:
        return {"text": random_tokens(text, length, self.architecture.transformer["joint_attention_dim"])}

    def stack(self, rows: Sequence[Rows], tokens: int) -> Rows:
        return padded_with_mask(rows, tokens)

    def guidance(self, scale: float) -> Guidance:
        """What its pipeline calls true_cfg_scale."""
        return Guidance(scale, rule=with_norms_of) if scale > 1 else Guidance(1.0)

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        text = condition["text"]
        return called(transformer, predict, x_t.to(text.dtype), timestep / 1000, text, condition["mask"])

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        calls = self.architecture.transformer["num_layers"]
        return (self.joint_attention(batch, latent, text_tokens, calls=calls, text=text_tokens),)


def predict(transformer: Any, x: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """ε − x0, (B, C, H, W), by the parts of `transformer`. Its own forward also finds the length of each text, which
    nothing reads; it brings a number from the host for that, and no graph could be captured.

    Args:
        x: (B, C, H, W) noisy latents.
        time: (B,), σ.
        text: (B, T, D).
        mask: (B, T) bool, true for a prompt's own tokens.
    """
    patches = F.pixel_unshuffle(x, PATCH)
    height, width = patches.shape[-2:]
    image, text = transformer.img_in(patches.flatten(2).transpose(1, 2)), transformer.txt_in(transformer.txt_norm(text))
    time = transformer.time_text_embed(time.to(image.dtype), image)
    places = transformer.pos_embed([[(1, height, width)]], max_txt_seq_len=text.shape[1], device=x.device)
    for block in transformer.transformer_blocks:
        text, image = block(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            temb=time,
            image_rotary_emb=places,
        )
    tokens = transformer.proj_out(transformer.norm_out(image, time))
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)


def with_norms_of(guided: Tensor, conditional: Tensor) -> Tensor:
    """`guided` with the norms of `conditional`, both (B, C, H, W), in each image token: 2 × 2 latents of C channels."""
    ratio = _token_norms(conditional) / _token_norms(guided)
    return guided * ratio.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).to(guided.dtype)


def _token_norms(velocity: Tensor) -> Tensor:
    return F.pixel_unshuffle(velocity.float(), PATCH).norm(dim=1, keepdim=True)


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels of latents, (C, 1, 1), in fp32."""
    mean, std = (tuple(numbers) for numbers in (vae.config.latents_mean, vae.config.latents_std))
    return _channels(mean, device), _channels(std, device)


@cache
def _channels(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # Made once: to bring numbers from the host is to wait for the device.
    return torch.tensor(numbers, device=device).view(-1, 1, 1)


def published(name: str) -> Architecture:
    """Qwen-Image, 20.43 B weights.

    Transformer and autoencoder have the defaults of diffusers' classes, which were written for them. The scheduler's
    numbers are those that the repository modelscope/DiffSynth-Studio has for this model.
    """
    return Architecture(
        index={
            "_class_name": "QwenImagePipeline",
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
            "tokenizer": ("transformers", "Qwen2Tokenizer"),
        },
        transformer={},
        vae={},
        text_encoders={"text_encoder": qwen25_vl_7b()},
        scheduler=flow_match_scheduler(
            1.0,
            use_dynamic_shifting=True,
            time_shift_type="exponential",
            base_image_seq_len=256,
            max_image_seq_len=8192,
            base_shift=0.5,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
        name=name,
    )


def qwen25_vl_7b() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B: 8.29 B weights with its vision tower and its output head, sizes by arXiv 2502.13923, Table 1."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
    )


QwenImage.known_models = {name: partial(published, name) for name in ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512")}
