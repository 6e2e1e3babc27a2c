"""Every family draws what diffusers' own pipeline of it draws, through `Family` alone."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.models.family import Family
from dgpo_fast.models.meta import stacked
from dgpo_fast.rollout.schedule import make_schedule
from tests.families import auraflow, chroma, cogview4, flux1, flux2, lumina2, qwen_image, sana, sd3, z_image
from tests.families.case import Case

PROMPTS = ("two red cups", "a sign that says open, above a very long street of small shops")
CASES: tuple[Case, ...] = (
    sd3.CASE,
    flux1.CASE,
    flux1.GUIDED,
    flux1.SCHNELL,
    chroma.CASE,
    chroma.MASKED,
    auraflow.CASE,
    *flux2.CASES,
    z_image.CASE,
    lumina2.CASE,
    qwen_image.CASE,
    sana.CASE,
    cogview4.CASE,
)
BUDGET = 1e-5


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Family]:
    """The case, its pipeline and its family."""
    case = request.param
    pipeline = case.make()
    return case, pipeline, case.family_of(pipeline, tmp_path_factory.mktemp(case.name))


def condition(family: Family, pipeline: Any, texts: Sequence[str], length: int, *, negative: bool = False) -> Any:
    """The prompts, stacked."""
    rows = [family.encode(pipeline, text, length, negative=negative) for text in texts]
    return stacked(family, rows)


@torch.no_grad()
def draw(
    family: Family,
    pipeline: Any,
    noise: Tensor,
    texts: Sequence[str],
    negative: str,
    scale: float,
    steps: int,
    case: Case,
) -> tuple[Tensor, Tensor]:
    """Latents and pixels by `Family` alone."""
    guidance, grid = family.guidance(scale), family.grid(steps, tuple(noise.shape[1:]))
    schedule = make_schedule(case.solver, steps, grid.shift, sigmas=grid.sigmas, last=grid.last)
    given = condition(family, pipeline, texts, case.length)
    against = condition(family, pipeline, [negative] * len(texts), case.length, negative=True) if guidance.pairs else {}
    embedded = None if guidance.embedded is None else torch.full((len(noise),), guidance.embedded)
    x, before = noise, noise
    for step, (sigma, after) in enumerate(pairwise(schedule.sigmas)):
        timestep = schedule.timesteps[step].expand(len(noise))
        v = family.velocity(pipeline.transformer, x, timestep, given, embedded).float()
        if guidance.pairs:
            v = guidance.combine(v, family.velocity(pipeline.transformer, x, timestep, against, embedded).float())
        if case.solver == "euler":
            x = x + (after - sigma) * v
            continue
        s, a, b, c = schedule.coefficients[step]
        x0 = x - s * v
        x, before = a * x + b * x0 + c * before, x0
    return x, family.decode(pipeline.vae, x)


def noise_of(family: Family, size: tuple[int, int], count: int = 1) -> Tensor:
    """Noise for `count` pictures."""
    return torch.randn(count, *family.latent_shape(*size), generator=torch.Generator().manual_seed(7))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_latents_and_pixels_are_those_of_diffusers_pipeline(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    noise = noise_of(family, case.size)
    for name, scale in case.scales.items():
        for steps in case.steps:
            expected = case.pipeline_draws(pipeline, noise, PROMPTS[0], "a blurred photo", scale, steps)
            found = draw(family, pipeline, noise, PROMPTS[:1], "a blurred photo", scale, steps, case)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.shape == theirs.shape
                assert relative(ours, theirs) < BUDGET, (name, steps)
                assert theirs.std() > 0.01


def test_prompts_of_different_lengths_in_one_batch_equal_one_by_one(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    noise, scale = noise_of(family, case.size, 2), max(case.scales.values())
    together, _ = draw(family, pipeline, noise, PROMPTS, "", scale, 4, case)
    apart = [draw(family, pipeline, noise[i : i + 1], PROMPTS[i : i + 1], "", scale, 4, case)[0] for i in (0, 1)]
    assert relative(together, torch.cat(apart)) < BUDGET


def test_prompt_guidance_time_and_place_change_the_picture(of: tuple[Case, Any, Family]) -> None:
    """The tests above would see an error in each of them."""
    case, pipeline, family = of
    noise, scale = noise_of(family, case.size), max(case.scales.values())
    latents, _ = draw(family, pipeline, noise, PROMPTS[:1], "", scale, 4, case)
    others = {"prompt": draw(family, pipeline, noise, PROMPTS[1:], "", scale, 4, case)[0]}
    others["place"] = draw(family, pipeline, noise.flip(-1), PROMPTS[:1], "", scale, 4, case)[0].flip(-1)
    if len(case.scales) > 1:
        others["guidance"] = draw(family, pipeline, noise, PROMPTS[:1], "", scale * 1.5, 4, case)[0]
    given = condition(family, pipeline, PROMPTS[:1], case.length)
    embedded = None if family.guidance(scale).embedded is None else torch.full((1,), scale)
    v, later = (
        family.velocity(pipeline.transformer, noise, torch.full((1,), time), given, embedded) for time in (500.0, 530.0)
    )
    assert relative(later, v) > 50 * BUDGET
    for name, changed in others.items():
        assert relative(changed, latents) > 20 * BUDGET, name


def test_encoding_pixels_inverts_decoding(of: tuple[Case, Any, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    """A random decoder has no inverse, but what it is given is what the encoder gave: all that lies between, scale and
    shift, packing and frames, is undone."""
    case, pipeline, family = of
    height, width = case.size
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1
    vae, passed = pipeline.vae, {}

    def encode(given: torch.Tensor, original: Any = vae.encode) -> Any:
        passed["encoded"] = original(given)
        return passed["encoded"]

    def decode(given: torch.Tensor, original: Any = vae.decode, **more: Any) -> Any:
        passed["decoded"] = given
        return original(given, **more)

    monkeypatch.setattr(vae, "encode", encode)
    monkeypatch.setattr(vae, "decode", decode)
    latents = family.encode_pixels(vae, pixels)
    assert latents.shape == (1, *family.latent_shape(height, width))
    assert latents.dtype == torch.float32
    assert family.decode(vae, latents).shape == pixels.shape
    found = passed["encoded"]
    raw = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
    assert raw.shape == passed["decoded"].shape
    assert relative(passed["decoded"], raw) < 1e-5


def test_the_random_condition_has_the_form_of_an_encoded_prompt(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    length = 64 if family.pads_to else case.length
    encoded, random = (
        family.encode(pipeline, PROMPTS[0], case.length, negative=False),
        family.random_condition("a", length),
    )
    assert form(random) == form(encoded)
    again, other = family.random_condition("a", length), family.random_condition("b", length)
    assert all(torch.equal(again[name], random[name]) for name in random)
    assert not all(torch.equal(other[name], random[name]) for name in random)


def form(rows: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Names, kinds and widths."""
    return {name: (tensor.dim(), tensor.shape[1:], tensor.is_floating_point()) for name, tensor in rows.items()}
