"""Z-Image and Z-Image-Turbo, whose text encoder is Qwen3-4B: its second last state of the prompt's own tokens.

A caption is rounded up to a multiple of 32 tokens by a learned one, which is not masked. The image stands before the
caption in the stream, and its positions begin behind the caption's own multiple.
"""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.families import autoencoder_kl
from dgpo_fast.models.families.flux2 import qwen3_4b
from dgpo_fast.models.families.single_stream import (
    SingleStream,
    from_patches,
    image_positions,
    text_positions,
    to_patches,
)
from dgpo_fast.models.family import Guidance, Rows, rounded_up

TURBO_SHIFT = 3.0
PATCHES = "2-1"
"""diffusers' name for those of 2 × 2 in one frame."""


def _published(name: str, shift: float) -> Architecture:
    """Z-Image or Z-Image-Turbo: 6.15 B weights.

    The transformer has the defaults of diffusers' class. The text encoder is Qwen3-4B, 4.02 B weights, of the width
    that the transformer reads. The shifts are those in ports of the published schedulers.
    """
    return Architecture(
        transformer={},
        vae=autoencoder_kl.FLUX1,
        index={"_class_name": "ZImagePipeline", "text_encoder": ["transformers", "Qwen3Model"]},
        text_encoders={"text_encoder": qwen3_4b()},
        scheduler=flow_match_scheduler(shift),
        name=name,
    )


class ZImage(SingleStream):
    """Z-Image, the base model and Turbo."""

    title = "Z-Image"
    known_models: ClassVar = {
        name: partial(_published, name, shift)
        for name, shift in (("Tongyi-MAI/Z-Image", 6.0), ("Tongyi-MAI/Z-Image-Turbo", TURBO_SHIFT))
    }
    depth_names = ("n_refiner_layers", "n_layers")
    lora_targets = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    comfyui = True
    pipeline_class = ZImagePipeline
    transformer_class = ZImageTransformer2DModel

    @property
    def distilled(self) -> bool:
        """By the name, or by the scheduler's shift, which is 3 for Turbo and 6 for the base model.

        Their other configuration files are the same, so a base model that is given a shift of 3 is taken for Turbo.
        """
        return "turbo" in self.architecture.name.lower() or self.architecture.shift == TURBO_SHIFT

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.distilled:
            return ()
        return ("taken for Z-Image-Turbo, by its name or its scheduler's shift of 3; its guidance_scale is 0",)

    @property
    def size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def heads(self) -> tuple[int, int]:
        config = self.architecture.transformer
        return config["n_heads"], config["dim"] // config["n_heads"]

    @property
    def longest_caption(self) -> int:
        # Captions begin at 1, and the image stands one behind.
        return (self.architecture.transformer["axes_lens"][0] - 2) // self.pads_to * self.pads_to

    def image_tokens(self, latent: tuple[int, ...]) -> int:
        return rounded_up(super().image_tokens(latent), self.pads_to)

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        # A list of its own: the pipeline writes into the one that it is given.
        prompts, _ = pipeline.encode_prompt(
            [text], pipeline.transformer.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"text": prompts[0]}

    def guidance(self, scale: float) -> Guidance:
        """The pipeline's rule is c + g·(c − u), if g > 0."""
        return Guidance(1.0 + max(scale, 0.0))

    def predict(self, transformer: Any, x: Tensor, time: Tensor, text: Tensor, length: Tensor) -> Tensor:
        height, width = x.shape[2:]
        whole = length + -length % self.pads_to
        modulation = transformer.t_embedder(time * transformer.t_scale).type_as(x)
        image, image_turns = self._image(transformer, x, whole + 1)
        for block in transformer.noise_refiner:
            image = block(image, None, image_turns, modulation)

        place = torch.arange(text.shape[1], device=x.device)
        own = place < length[:, None]
        text = torch.where(own[..., None], transformer.cap_embedder(text), transformer.cap_pad_token)
        text_turns = _turns(transformer, text_positions(len(x), place + 1))
        # In a batch of the shortest length, all captions are whole: without a mask, faster kernels can attend.
        read = place < whole[:, None] if len(place) > self.pads_to else None
        for block in transformer.context_refiner:
            text = block(text, read, text_turns)

        stream, turns = torch.cat([image, text], dim=1), torch.cat([image_turns, text_turns], dim=1)
        mask = None if read is None else F.pad(read, (image.shape[1], 0), value=True)
        for block in transformer.layers:
            stream = block(stream, mask, turns, modulation)
        tokens = stream[:, : super().image_tokens(x.shape[1:])]
        return -from_patches(transformer.all_final_layer[PATCHES](tokens, c=modulation), height, width)

    def _image(self, transformer: Any, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) tokens of latents, rounded up by the learned one, and their turns from `start` (B,)."""
        tokens = transformer.all_x_embedder[PATCHES](to_patches(x))
        count, missing = tokens.shape[1], -tokens.shape[1] % self.pads_to
        own = torch.arange(count + missing, device=x.device) < count
        rounded = torch.where(own[:, None], F.pad(tokens, (0, 0, 0, missing)), transformer.x_pad_token)
        positions = F.pad(image_positions(start, *x.shape[2:]), (0, 0, 0, missing))
        return rounded, _turns(transformer, positions)


def _turns(transformer: Any, positions: Tensor) -> Tensor:
    """Complex factors that turn queries and keys at (B, S, 3) positions."""
    return transformer.rope_embedder(positions.flatten(0, 1)).unflatten(0, positions.shape[:2])
