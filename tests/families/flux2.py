"""Small random pipelines of FLUX.2: klein, base and distilled, and dev.

Their text encoders are as deep as the layers that are read ask for, and have at least one more.
"""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from tests.families.byte_tokenizer import CHATML, VOCABULARY, byte_tokenizer
from tests.families.case import Case, fill
from tests.families.tiny_parts import drawn, quiet

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
MISTRAL_MARKS = ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
    "[{{ mark }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ mark }}]{% endfor %}"
)


def make_klein(*, distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """klein with 28 layers of Qwen3."""
    encoder = fill(Qwen3ForCausalLM(Qwen3Config(**TEXT, num_hidden_layers=28)), seed)
    return Flux2KleinPipeline(
        **_drawing_parts(seed, guidance_embeds=False),
        text_encoder=encoder,
        tokenizer=byte_tokenizer(template=CHATML),
        is_distilled=distilled,
    )


def make_dev(seed: int = 0) -> Flux2Pipeline:
    """dev with 31 layers of Mistral, whose tokenizer pads on the left.

    It has the tokenizer alone, where the published model has a processor of pictures too, which needs torchvision.
    """
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, "num_hidden_layers": 31, "sliding_window": None},
        vision_config={"model_type": "pixtral", **vision, "image_size": 32},
    )
    return Flux2Pipeline(
        **_drawing_parts(seed, guidance_embeds=True),
        text_encoder=fill(Mistral3ForConditionalGeneration(config), seed),
        tokenizer=byte_tokenizer(MISTRAL_MARKS, template=MISTRAL_TEMPLATE, padding_side="left"),
    )


def pipeline_draws(
    pipeline: Any, noise: Tensor, prompt: str, negative: str, scale: float, steps: int
) -> tuple[Tensor, Tensor]:
    """As `Case.pipeline_draws`; there is no negative prompt."""
    height, width = noise.shape[2:]
    options = {"prompt": prompt, "guidance_scale": scale, "num_inference_steps": steps}
    tokens, pixels = drawn(quiet(pipeline), noise, height=16 * height, width=16 * width, **options)
    return tokens.transpose(1, 2).unflatten(2, (height, width)), pixels


def _drawing_parts(seed: int, *, guidance_embeds: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT["hidden_size"],
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    fill(transformer, seed)
    for name, weight in transformer.named_parameters():
        # At full size, one rounding of the time in fp32 moves this network's latents by 1e-5.
        if "modulation" in name or "norm_out" in name:
            weight.mul_(0.3)
    vae = AutoencoderKLFlux2(latent_channels=2, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
    generator = torch.Generator().manual_seed(seed)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.5, 2.0, generator=generator)
    # dev's scheduler is FLUX.1-dev's, by diffusers' conversion script.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": fill(vae, seed), "scheduler": scheduler}


KLEIN = Case("flux2_klein", make_klein, "dgpo_fast.models.families.flux2:Flux2Klein", pipeline_draws, size=(64, 96))
KLEIN_DISTILLED = Case(
    "flux2_klein_distilled",
    partial(make_klein, distilled=True),
    KLEIN.family,
    pipeline_draws,
    size=(64, 96),
    scales={"without guidance": 4.0},
)
DEV = Case(
    "flux2_dev",
    make_dev,
    "dgpo_fast.models.families.flux2:Flux2",
    pipeline_draws,
    size=(64, 96),
    scales={"read": 4.0, "read as 1": 1.0},
)
CASES = (KLEIN, KLEIN_DISTILLED, DEV)
