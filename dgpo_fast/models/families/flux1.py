"""FLUX.1: dev, which reads the guidance scale as a number, and schnell, which is distilled to a few steps.

A latent is (16, height / 8, width / 8), a token a patch of 2 × 2 of it. T5's text stands before the image, padded to
one length that no mask hides. CLIP's pooled embedding goes in beside the time.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.families import autoencoder_kl
from dgpo_fast.models.families.packing import PATCH, PackedLatents, shift_by_size
from dgpo_fast.models.families.sd3 import ATTENTION_LAYERS, clip_l, t5_xxl
from dgpo_fast.models.family import AttentionShape, Grid, Guidance, Rows, TextLimit, even_sigmas, text_seed

T5_STD = 0.2
"""Of the trained T5's embeddings."""
EMBEDDED_SCALE = 3.5
"""The pipeline's default `guidance_scale`."""
SCHNELL_TOKENS = 256
"""Of T5: schnell was not trained on more."""


class Packed(PackedLatents):
    """What FLUX.1 and Chroma share: tokens are patches of 2 × 2 with positions; the shift grows with their number."""

    block_names = ("transformer_blocks", "single_transformer_blocks")
    vae_class = AutoencoderKL

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.pixels = autoencoder_kl.pixels_per_latent(self.architecture.vae)
        self.multiple = PATCH * self.pixels

    def one_of_each_block(self) -> tuple[dict[str, Any], list[int]]:
        return one_of_each(self.architecture.transformer, "num_layers", "num_single_layers")

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        return autoencoder_kl.decode(vae, latents)

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        return autoencoder_kl.encode(vae, pixels)

    def grid(self, steps: int, latent: tuple[int, ...]) -> Grid:
        scheduler = self.architecture.scheduler
        if not scheduler.get("use_dynamic_shifting"):
            return Grid(self.architecture.shift, sigmas=even_sigmas(steps))
        return Grid(shift_by_size(scheduler, self.image_tokens(latent)), sigmas=even_sigmas(steps))

    def attention_shapes(self, batch: int, latent: tuple[int, ...], text_tokens: int) -> tuple[AttentionShape, ...]:
        config = self.architecture.transformer
        # In single blocks, text and image are one sequence already.
        return (
            self.joint_attention(batch, latent, text_tokens, calls=config["num_layers"], text=text_tokens),
            self.joint_attention(batch, latent, text_tokens, calls=config["num_single_layers"]),
        )

    def predict(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, prompt: Tensor, **more: Tensor | None
    ) -> Tensor:
        """`velocity`, of (B, L, D) text and of what else the transformer is called with."""
        height, width = (side // PATCH for side in x_t.shape[-2:])
        tokens = transformer(
            hidden_states=F.pixel_unshuffle(x_t.to(prompt.dtype), PATCH).flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=x_t.device),
            img_ids=positions(height, width, x_t.device),
            return_dict=False,
            **more,
        )[0]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)


class Flux1(Packed):
    """FLUX.1-dev and -schnell."""

    title = "FLUX.1"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    lora_targets = (*ATTENTION_LAYERS, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    comfyui = True
    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        if self.distilled:
            self.text_length = SCHNELL_TOKENS

    @property
    def distilled(self) -> bool:
        # No file says so. Of the published models, schnell alone reads no guidance scale; a fine-tune that has undone
        # its distillation looks the same.
        return not self.architecture.transformer["guidance_embeds"]

    @property
    def notes(self) -> tuple[str, ...]:
        if self.distilled:
            return ("FLUX.1-schnell has no guidance: guidance_scale and negative prompts are not used",)
        return (
            "FLUX.1-dev is guidance-distilled: it reads guidance_scale as a number, in training too, and 1 is not "
            "unguided; negative prompts are not used",
        )

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        device = pipeline.transformer.device
        prompt, pooled, _ = pipeline.encode_prompt(prompt=text, device=device, max_sequence_length=length)
        return {"prompt": prompt[0], "pooled": pooled[0]}

    def random_condition(self, text: str, length: int) -> Rows:
        config, generator = self.architecture.transformer, torch.Generator().manual_seed(text_seed(text))
        return {
            "prompt": T5_STD * torch.randn(length, config["joint_attention_dim"], generator=generator),
            "pooled": torch.randn(config["pooled_projection_dim"], generator=generator),
        }

    def text_limits(self, length: int) -> list[TextLimit]:
        return [TextLimit("CLIP", ("tokenizer",)), TextLimit("T5", ("tokenizer_2",), length)]

    def guidance(self, scale: float) -> Guidance:
        return Guidance(1.0, embedded=None if self.distilled else scale)

    def velocity(
        self, transformer: nn.Module, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        pooled = condition["pooled"]
        return self.predict(
            transformer, x_t, timestep, condition["prompt"], pooled_projections=pooled, guidance=embedded
        )


class GuidedFlux1(Flux1):
    """FLUX.1 guided against the negative prompt, as its pipeline is with `true_cfg_scale`, which is the number here.
    Models that read a guidance scale get the pipeline's default of it; others are taken for undistilled ones."""

    distilled = False
    notes = ()

    def guidance(self, scale: float) -> Guidance:
        reads_scale = self.architecture.transformer["guidance_embeds"]
        return Guidance(max(scale, 1.0), embedded=EMBEDDED_SCALE if reads_scale else None)


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height·width, 3) fp32: 0, row and column of each token."""
    axes = torch.arange(1, device=device), torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(*axes).float()


def one_of_each(config: Mapping[str, Any], joint: str, single: str) -> tuple[dict[str, Any], list[int]]:
    """`Family.one_of_each_block` of a transformer with blocks of two kinds, one kind after the other.

    Args:
        config: of the transformer.
        joint, single: names of the numbers of blocks in it, in the order of a forward; there are some of both.
    """
    # Nothing before the first block needs a gradient with LoRA, so it saves less than the next; the first single block
    # is the first to save what all of them read.
    counts = [[1, config[name] - 1] if config[name] > 1 else [1] for name in (joint, single)]
    return {**config, joint: len(counts[0]), single: len(counts[1])}, [*counts[0], *counts[1]]


def known(name: str) -> Architecture:
    """FLUX.1-dev, of 11.90 B weights, or -schnell, of 11.89 B, by its name on the hub.

    The transformer is what diffusers' convert_flux_to_diffusers.py builds, its class with the defaults, and
    `guidance_embeds` for dev. Shifts are those of `get_schedule` in sampling.py of the repository
    black-forest-labs/flux, whose util.py names the text encoders: CLIP-L, and the encoder of T5-v1.1-XXL.
    """
    is_dev = name.endswith("dev")
    parts = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
    }
    return Architecture(
        index={"_class_name": "FluxPipeline", **{part: ["transformers", kind] for part, kind in parts.items()}},
        transformer={"guidance_embeds": is_dev},
        vae=autoencoder_kl.FLUX1,
        text_encoders={"text_encoder": clip_l(), "text_encoder_2": t5_xxl()},
        scheduler=scheduler_numbers(dynamic=is_dev),
        name=name,
    )


def scheduler_numbers(*, dynamic: bool) -> dict[str, Any]:
    """The configuration of FLUX.1's scheduler, with the numbers that its pipeline falls back to."""
    numbers = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return flow_match_scheduler(1.0, use_dynamic_shifting=dynamic, **numbers)


Flux1.known_models = {
    name: partial(known, name) for name in ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")
}
