"""Lumina-Image 2.0, whose text encoder is Gemma-2-2B: its second last state of the prompt's own tokens.

Prompts stand behind a system prompt, negative prompts do not. The image's positions begin behind the caption's own
tokens. Guidance keeps the size of each row of the conditional velocity.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor
from transformers import Gemma2Config

from dgpo_fast.models.architecture import Architecture, flow_match_scheduler
from dgpo_fast.models.families import autoencoder_kl
from dgpo_fast.models.families.single_stream import (
    SingleStream,
    from_patches,
    image_positions,
    text_positions,
    to_patches,
)
from dgpo_fast.models.family import Guidance, Rows

LUMINA_IMAGE_2 = "Alpha-VLLM/Lumina-Image-2.0"


def _published() -> Architecture:
    """Lumina-Image 2.0: 2.61 B weights.

    The transformer has the defaults of diffusers' class, and the text encoder those of transformers', which are
    Gemma-2-2B's, 2.61 B weights. The shift is the one in ports of the published scheduler.
    """
    encoder = Gemma2Config()
    return Architecture(
        transformer={"cap_feat_dim": encoder.hidden_size},
        vae=autoencoder_kl.FLUX1,
        index={"_class_name": "Lumina2Pipeline", "text_encoder": ["transformers", "Gemma2Model"]},
        text_encoders={"text_encoder": encoder},
        scheduler=flow_match_scheduler(6.0),
        name=LUMINA_IMAGE_2,
    )


class Lumina2(SingleStream):
    """Lumina-Image 2.0."""

    title = "Lumina2"
    known_models: ClassVar = {LUMINA_IMAGE_2: _published}
    depth_names = ("num_refiner_layers", "num_layers")
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    text_length = 256
    negatives_differ = True
    pipeline_class = Lumina2Pipeline
    transformer_class = Lumina2Transformer2DModel

    @property
    def heads(self) -> tuple[int, int]:
        config = self.architecture.transformer
        return config["num_attention_heads"], config["hidden_size"] // config["num_attention_heads"]

    @property
    def longest_caption(self) -> int:
        # Captions begin at 0, and the image stands behind.
        return self.architecture.transformer["axes_lens"][0] - 1

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        device = pipeline.transformer.device
        if negative:
            states, mask = pipeline._get_gemma_prompt_embeds([text], device, max_sequence_length=length)
        else:
            states, mask, *_ = pipeline.encode_prompt([text], False, device=device, max_sequence_length=length)
        return {"text": states[mask.bool()]}

    def guidance(self, scale: float) -> Guidance:
        return Guidance(scale, rule=with_the_size_of) if scale > 1 else Guidance(1.0)

    def predict(self, transformer: Any, x: Tensor, time: Tensor, text: Tensor, length: Tensor) -> Tensor:
        height, width = x.shape[2:]
        modulation, text = transformer.time_caption_embed(x, time, text)
        image = transformer.x_embedder(to_patches(x))
        image_turns = _turns(transformer, image_positions(length, height, width))
        for block in transformer.noise_refiner:
            image = block(image, None, image_turns, modulation)

        place = torch.arange(text.shape[1], device=x.device)
        read = place < length[:, None]
        # Padding may reach beyond the last position.
        text_turns = _turns(transformer, text_positions(len(x), place.clamp(max=self.longest_caption)))
        for block in transformer.context_refiner:
            text = block(text, read, text_turns)

        stream, turns = torch.cat([image, text], dim=1), torch.cat([image_turns, text_turns], dim=1)
        mask = F.pad(read, (image.shape[1], 0), value=True)
        for block in transformer.layers:
            stream = block(stream, mask, turns, modulation)
        return -from_patches(transformer.norm_out(stream[:, : image.shape[1]], modulation), height, width)


def _turns(transformer: Any, positions: Tensor) -> Tensor:
    """Complex factors that turn queries and keys at (B, S, 3) positions."""
    embedder = transformer.rope_embedder
    # Moved once. The transformer's own forward copies the tables each time, and the device waits for it.
    embedder.freqs_cis = [table.to(positions.device) for table in embedder.freqs_cis]
    return torch.cat([table[positions[..., axis]] for axis, table in enumerate(embedder.freqs_cis)], dim=-1)


def with_the_size_of(guided: Tensor, conditional: Tensor) -> Tensor:
    """`guided` with the norm of `conditional` in each row of the latent, as the pipeline has it by default."""
    wanted, found = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (conditional, guided))
    return guided * (wanted / found)
