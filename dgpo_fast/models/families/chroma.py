"""Chroma: FLUX.1-schnell without its distillation, guided by a negative prompt; one module makes all modulations.

Only T5's text goes in. How its padding is hidden is a choice. diffusers' pipeline does not hide it: it adds a mask
of zeros and ones to the scores of attention, +1 between any two tokens that are to be seen and 0 elsewhere. `Chroma`
draws as that pipeline does. `MaskedChroma` draws as the model was trained: padding is hidden but for its first token.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from torch import Tensor

from dgpo_fast.models.architecture import Architecture
from dgpo_fast.models.families import autoencoder_kl
from dgpo_fast.models.families.calling import forward_of
from dgpo_fast.models.families.flux1 import T5_STD, Packed, scheduler_numbers
from dgpo_fast.models.families.sd3 import ATTENTION_LAYERS, t5_xxl
from dgpo_fast.models.family import Rows, random_tokens

CHROMA1_HD = "lodestones/Chroma1-HD"


class Chroma(Packed):
    """Chroma with the mask of diffusers' pipeline."""

    title = "Chroma"
    text_parts = ("text_encoder", "tokenizer")
    lora_targets = ATTENTION_LAYERS
    comfyui = True
    attention_names = ("native", "native_cudnn", "xformers")  # those that take a mask
    pipeline_class = ChromaPipeline
    transformer_class = ChromaTransformer2DModel

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        prompt, _, mask, *_ = pipeline.encode_prompt(
            prompt=text,
            device=pipeline.transformer.device,
            max_sequence_length=length,
            do_classifier_free_guidance=False,
        )
        return {"prompt": prompt[0], "mask": mask[0]}

    def random_condition(self, text: str, length: int) -> Rows:
        prompt = random_tokens(text, length, self.architecture.transformer["joint_attention_dim"], T5_STD)
        # One token a word, one that ends the text, and the first of the padding.
        return {"prompt": prompt, "mask": (torch.arange(length) < len(text.split()) + 2).float()}

    def velocity(
        self, transformer: Any, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        prompt = condition["prompt"]
        mask = F.pad(self.mask(condition["mask"], prompt.dtype), (0, self.image_tokens(tuple(x_t.shape[1:]))), value=1)
        with forward_of(transformer.time_text_embed, modulation_inputs):
            return self.predict(transformer, x_t, timestep, prompt, attention_mask=mask)

    def mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """The transformer's mask of text, (B, L), from one that is 1 at the tokens that are to be seen."""
        return seen.to(dtype)


class MaskedChroma(Chroma):
    """Chroma with a mask that hides padding, of which a row then needs no more than the longest one beside it."""

    pads_to = 32

    def encode(self, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        return _seen(super().encode(pipeline, text, length, negative=negative))

    def random_condition(self, text: str, length: int) -> Rows:
        prompt = super().random_condition(text, length)["prompt"]
        return {"prompt": prompt, "mask": torch.ones(length)}

    def stack(self, rows: Sequence[Rows], tokens: int) -> Rows:
        def padded(row: Rows) -> Rows:
            more = tokens - self.text_tokens(row)
            return {"prompt": F.pad(row["prompt"], (0, 0, 0, more)), "mask": F.pad(row["mask"], (0, more))}

        return super().stack([padded(row) for row in rows], tokens)

    def mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        return seen > 0


def modulation_inputs(embed: Any, timestep: Tensor) -> Tensor:
    """(B, M, D): time, a guidance of 0 and the number of each of M modulations, as sines and cosines.

    diffusers' own brings the zeros from the host, and no graph could be captured.
    """
    time, guidance = embed.time_proj(timestep), embed.guidance_proj(torch.zeros_like(timestep))
    both = torch.cat([time, guidance], dim=1)[:, None].expand(-1, len(embed.mod_proj), -1)
    return torch.cat([both, embed.mod_proj.expand(len(timestep), -1, -1)], dim=-1).to(timestep.dtype)


def _seen(row: Rows) -> Rows:
    """An encoded prompt's tokens that are to be seen."""
    return {name: tensor[row["mask"] > 0] for name, tensor in row.items()}


def chroma1_hd() -> Architecture:
    """Chroma1-HD, of 8.90 B weights.

    The transformer is diffusers' class with all its defaults, to which its single-file loader converts Chroma; the text
    encoder is the one that the pipeline's docstring names, T5-v1.1-XXL; the autoencoder and the scheduler are FLUX.1's.
    """
    parts = {"text_encoder": "T5EncoderModel", "tokenizer": "T5TokenizerFast"}
    return Architecture(
        index={"_class_name": "ChromaPipeline", **{part: ["transformers", kind] for part, kind in parts.items()}},
        transformer={},
        vae=autoencoder_kl.FLUX1,
        text_encoders={"text_encoder": t5_xxl()},
        scheduler=scheduler_numbers(dynamic=True),
        name=CHROMA1_HD,
    )


Chroma.known_models = {CHROMA1_HD: chroma1_hd}
