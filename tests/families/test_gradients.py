"""The gradient of a LoRA through `Family.velocity` is that through a call of diffusers' transformer, written out."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dgpo_fast.engine.checkpointing import checkpoint_blocks
from dgpo_fast.models.family import Family, attach
from tests.families import auraflow, chroma, flux1, flux2
from tests.families.case import Case, fill
from tests.families.test_pictures import BUDGET, PROMPTS, condition, noise_of, relative

SIGMA, SCALE = 0.5, 3.5
Plain = Callable[[Any, Any, Tensor, Sequence[str]], Tensor]
"""(pipeline, transformer, x_t (B, C, H, W), prompts) → velocities (B, C, H, W) at `SIGMA`."""


def times(x_t: Tensor) -> Tensor:
    return torch.full((len(x_t),), SIGMA)


def packed(pipeline: Any, transformer: Any, x_t: Tensor, prompt: Tensor, **more: Tensor | None) -> Tensor:
    """Of a transformer that takes patches of 2 × 2."""
    height, width = x_t.shape[-2:]
    tokens = transformer(
        hidden_states=pipeline._pack_latents(x_t, *x_t.shape),
        timestep=times(x_t),
        encoder_hidden_states=prompt,
        txt_ids=torch.zeros(prompt.shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(len(x_t), height // 2, width // 2, "cpu", torch.float32),
        **more,
    ).sample
    factor = pipeline.vae_scale_factor
    return pipeline._unpack_latents(tokens, factor * height, factor * width, factor)


def plain_flux1(pipeline: Any, transformer: Any, x_t: Tensor, prompts: Sequence[str]) -> Tensor:
    prompt, pooled, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=flux1.LENGTH)
    guidance = torch.full((len(x_t),), SCALE) if transformer.config.guidance_embeds else None
    return packed(pipeline, transformer, x_t, prompt, pooled_projections=pooled, guidance=guidance)


def plain_chroma(pipeline: Any, transformer: Any, x_t: Tensor, prompts: Sequence[str], dtype: Any = float) -> Tensor:
    options = {"max_sequence_length": chroma.LENGTH, "do_classifier_free_guidance": False}
    prompt, _, mask, *_ = pipeline.encode_prompt(list(prompts), **options)
    image = torch.ones(len(x_t), x_t[0, 0].numel() // 4)
    return packed(pipeline, transformer, x_t, prompt, attention_mask=torch.cat([mask, image], dim=1).to(dtype))


def plain_auraflow(pipeline: Any, transformer: Any, x_t: Tensor, prompts: Sequence[str]) -> Tensor:
    options = {"max_sequence_length": auraflow.LENGTH, "do_classifier_free_guidance": False}
    prompt, *_ = pipeline.encode_prompt(list(prompts), **options)
    return transformer(x_t, encoder_hidden_states=prompt, timestep=times(x_t)).sample


def plain_flux2(pipeline: Any, transformer: Any, x_t: Tensor, prompts: Sequence[str]) -> Tensor:
    prompt, positions = pipeline.encode_prompt(list(prompts), max_sequence_length=flux2.DEV.length)
    tokens = transformer(
        hidden_states=pipeline._pack_latents(x_t),
        encoder_hidden_states=prompt,
        timestep=times(x_t),
        img_ids=pipeline._prepare_latent_ids(x_t),
        txt_ids=positions,
        guidance=torch.full((len(x_t),), SCALE) if transformer.config.guidance_embeds else None,
    ).sample
    return pipeline._unpack_latents_with_ids(tokens, pipeline._prepare_latent_ids(x_t))


PLAIN: tuple[tuple[Case, Plain], ...] = (
    (flux1.CASE, plain_flux1),
    (flux1.SCHNELL, plain_flux1),
    (chroma.CASE, lambda *given: plain_chroma(*given, dtype=torch.float32)),
    (chroma.MASKED, lambda *given: plain_chroma(*given, dtype=torch.bool)),
    (auraflow.CASE, plain_auraflow),
    (flux2.KLEIN, plain_flux2),
    (flux2.DEV, plain_flux2),
)


@pytest.mark.parametrize(("case", "plain"), PLAIN, ids=[case.name for case, _ in PLAIN])
def test_the_gradient_of_a_lora_is_that_of_diffusers_transformer(case: Case, plain: Plain, tmp_path: Path) -> None:
    """Also with checkpointed blocks, for which diffusers has a way of its own: in Chroma it forgets the mask."""
    pipeline = case.make()
    family = case.family_of(pipeline, tmp_path)
    weights = noise_of(family, case.size, 2).flip(0)
    transformer = with_lora(pipeline.transformer, family.lora_targets)
    theirs = gradients(transformer, plain(pipeline, transformer, x_t(case, family), PROMPTS), weights)
    checkpointed = with_lora(pipeline.transformer, family.lora_targets)
    checkpoint_blocks(attach(checkpointed, family), "blocks")
    for ours in (transformer, checkpointed):
        found = gradients(ours, predict(case, family, pipeline, ours), weights)
        assert found.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert gradient.abs().max() > 0, name
            assert relative(found[name], gradient) < BUDGET, name


def x_t(case: Case, family: Family) -> Tensor:
    return noise_of(family, case.size, len(PROMPTS))


def predict(case: Case, family: Family, pipeline: Any, transformer: Any) -> Tensor:
    """By the family."""
    noisy, scale = x_t(case, family), family.guidance(SCALE).embedded
    embedded = None if scale is None else torch.full((len(noisy),), scale)
    given = condition(family, pipeline, PROMPTS, case.length)
    return family.velocity(transformer, noisy, 1000 * times(noisy), given, embedded)


def with_lora(transformer: Any, targets: tuple[str, ...] | str) -> Any:
    """A copy with trained factors, all of them random."""
    copied = copy.deepcopy(transformer).requires_grad_(False)
    named = targets if isinstance(targets, str) else list(targets)
    copied.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=named))
    factors = torch.nn.ParameterList(weight for name, weight in copied.named_parameters() if "lora_" in name)
    fill(factors, seed=5)
    factors.requires_grad_(True)
    return copied


def gradients(transformer: Any, velocity: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Of the weighted sum of a velocity, by the name of each factor."""
    named = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    return dict(zip(named, torch.autograd.grad((velocity * weights).sum(), list(named.values())), strict=True))
