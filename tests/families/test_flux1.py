"""FLUX.1, Chroma and AuraFlow: what no other family has, and their sizes."""

from functools import cache
from math import exp
from pathlib import Path

import pytest
import torch

from dgpo_fast.models.families import auraflow, chroma, flux1
from dgpo_fast.models.family import AttentionShape, Family, Guidance, even_sigmas
from tests.families import chroma as tiny_chroma
from tests.families.test_pictures import BUDGET, PROMPTS, condition, noise_of, relative

FAMILIES: dict[str, type[Family]] = {
    name: kind for kind in (flux1.Flux1, chroma.Chroma, auraflow.AuraFlow) for name in kind.known_models
}
DEV, SCHNELL, CHROMA, AURAFLOW = FAMILIES


@cache
def known(name: str) -> Family:
    kind = FAMILIES[name]
    return kind(kind.known_models[name]())


@pytest.mark.parametrize(
    ("name", "weights", "layers", "blocks"),
    [
        (DEV, 11.90, 342, [1, 18, 1, 37]),
        (SCHNELL, 11.89, 342, [1, 18, 1, 37]),
        (CHROMA, 8.90, 266, [1, 18, 1, 37]),
        (AURAFLOW, 6.86, 160, [1, 3, 1, 31]),
    ],
)
def test_a_known_model_is_as_large_as_the_published_one(
    name: str, weights: float, layers: int, blocks: list[int]
) -> None:
    family = known(name)
    with torch.device("meta"):
        transformer, vae = family.build_transformer(), family.build_vae()
    assert billions(transformer) == weights
    assert billions(vae, digits=4) == {AURAFLOW: 0.0837}.get(name, 0.0838)
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sum(name.endswith(tuple(f".{end}" for end in family.lora_targets)) for name in names) == layers
    assert family.one_of_each_block()[1] == blocks
    assert len(family.blocks(transformer)) == sum(blocks)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (DEV, {"text_encoder": 0.123, "text_encoder_2": 4.762}),
        (CHROMA, {"text_encoder": 4.762}),
        (AURAFLOW, {"text_encoder": 1.224}),
    ],
)
def test_text_encoders_are_as_large_as_the_published_ones(name: str, expected: dict[str, float]) -> None:
    architecture = known(name).architecture
    with torch.device("meta"):
        found = {part: billions(architecture.build_text_encoder(part), digits=3) for part in architecture.text_encoders}
    assert found == expected


def billions(module: torch.nn.Module, digits: int = 2) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e9, digits)


def test_pictures_of_a_known_model() -> None:
    for name, channels in ((DEV, 16), (CHROMA, 16), (AURAFLOW, 4)):
        family = known(name)
        assert family.size == (1024, 1024)
        assert family.multiple == 16
        latent = family.latent_shape(512, 1024)
        assert latent == (channels, 64, 128)
        assert family.image_tokens(latent) == 32 * 64
    assert known(AURAFLOW).largest_side == 96 * 16


def test_the_shift_grows_with_the_picture_but_for_schnell() -> None:
    small, large = (16, 64, 64), (16, 128, 128)
    for name in (DEV, CHROMA):
        assert [round(known(name).grid(4, latent).shift, 3) for latent in (small, large)] == [1.878, 3.158]
        assert known(name).grid(4, large).sigmas == even_sigmas(4)
    assert known(SCHNELL).grid(4, large).shift == 1
    assert known(SCHNELL).grid(4, large).sigmas == even_sigmas(4)
    assert known(AURAFLOW).grid(4, large).shift == 1.73
    assert known(AURAFLOW).grid(4, large).sigmas is None


def test_a_linear_time_shift_is_the_number_itself() -> None:
    given = {"base_image_seq_len": 100, "max_image_seq_len": 200, "base_shift": 1.0, "max_shift": 3.0}
    assert flux1.shift_by_size(given, 150) == pytest.approx(exp(2.0))
    assert flux1.shift_by_size({**given, "time_shift_type": "linear"}, 150) == pytest.approx(2.0)


def test_dev_reads_the_guidance_scale_and_schnell_has_none() -> None:
    dev, schnell = known(DEV), known(SCHNELL)
    assert dev.guidance(1.0) == Guidance(1.0, embedded=1.0)
    assert not dev.guidance(3.5).pairs
    assert schnell.guidance(3.5) == Guidance(1.0)
    assert (dev.distilled, schnell.distilled) == (False, True)
    assert (dev.text_length, schnell.text_length) == (512, 256)
    assert "guidance-distilled" in dev.notes[0]
    assert "no guidance" in schnell.notes[0]


def test_attention_at_full_size() -> None:
    joint, single = known(DEV).attention_shapes(2, (16, 128, 128), 512)
    assert joint == AttentionShape(2, 4608, 24, 128, calls=19, text=512)
    assert single == AttentionShape(2, 4608, 24, 128, calls=38)
    joint, single = known(AURAFLOW).attention_shapes(1, (4, 128, 128), 256)
    assert joint == AttentionShape(1, 4360, 12, 256, calls=4, text=264)


def test_chromas_shipped_mask_lets_padding_act_and_the_other_does_not(tmp_path: Path) -> None:
    pipeline = tiny_chroma.make()
    shipped = tiny_chroma.CASE.family_of(pipeline, tmp_path)
    masked = chroma.MaskedChroma(shipped.architecture)
    noise, moved = noise_of(shipped, tiny_chroma.CASE.size), {}
    given = condition(shipped, pipeline, PROMPTS[:1], tiny_chroma.LENGTH)
    hidden = given["mask"] == 0
    assert 0 < hidden.sum() < tiny_chroma.LENGTH
    other = {**given, "prompt": torch.where(hidden.unsqueeze(-1), 5.0, given["prompt"])}
    for family in (shipped, masked):
        v, changed = (
            family.velocity(pipeline.transformer, noise, torch.full((1,), 500.0), rows, None) for rows in (given, other)
        )
        moved[family] = relative(changed, v)
    assert moved[masked] == 0
    assert moved[shipped] > 1000 * BUDGET


def test_chromas_blocks_get_their_mask_as_an_argument(tmp_path: Path) -> None:
    """diffusers' own checkpointing leaves it out of the single blocks; checkpointed one by one, blocks keep it."""
    pipeline = tiny_chroma.make()
    family = tiny_chroma.CASE.family_of(pipeline, tmp_path)
    given = condition(family, pipeline, PROMPTS, tiny_chroma.LENGTH)
    masks = []

    def keep(block: torch.nn.Module, args: tuple, kwargs: dict[str, torch.Tensor]) -> None:
        masks.append(kwargs["attention_mask"])

    for block in family.blocks(pipeline.transformer):
        block.register_forward_pre_hook(keep, with_kwargs=True)
    family.velocity(pipeline.transformer, noise_of(family, (16, 24), 2), torch.full((2,), 500.0), given, None)
    assert len(masks) == 6
    expected = torch.cat([given["mask"], torch.ones(2, 24)], dim=1)
    assert all(torch.equal(mask, expected) for mask in masks)
