"""The rollout draws what diffusers' own pipeline draws, whatever the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Guidance, family_of
from dgpo_fast.models.latents import latent_shape
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import Sampler, initial_noise, plain_decoding
from dgpo_fast.rollout.schedule import make_schedule, make_scheduler
from dgpo_fast.trainer import Trainer

PROMPTS = ["a cat", "two birds", "a house", "big red car", "a cat"]


@pytest.fixture(scope="module")
def pipeline(random_pipeline: Path) -> object:
    return load_pipeline(str(random_pipeline), revision=None, device=torch.device("cpu"), dtype=torch.float32)


def make_sampler(pipeline: object) -> Sampler:
    encoder = PromptEncoder(pipeline, max_sequence_length=9)
    decode = plain_decoding(pipeline.vae, 2)  # type: ignore[attr-defined]
    return Sampler(pipeline, pipeline.transformer, encoder, resolution=None, decode=decode)  # type: ignore[attr-defined]


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_same_pictures_as_diffusers(pipeline: object, solver: str, guidance_scale: float) -> None:
    """Same noise, same scheduler: latents to 1e-4 and pictures to 1/255 (forwards are batched differently)."""
    sampler, draw = make_sampler(pipeline), Draw(make_schedule(solver, 7, 3.0), Guidance(guidance_scale), batch_size=2)
    x0 = torch.cat(list(sampler.batches(PROMPTS, draw, first=3, seed=5)))
    ours = sampler.decode(x0).images
    original, pipeline.scheduler = pipeline.scheduler, make_scheduler(solver, 3.0)  # type: ignore[attr-defined]
    call = {
        "latents": initial_noise(sampler.shape, torch.arange(3, 8), seed=5, draw=0),
        "num_inference_steps": 7,
        "guidance_scale": guidance_scale,
        "max_sequence_length": 9,
        "height": 16,
        "width": 16,
    }
    theirs_x0 = pipeline(PROMPTS, output_type="latent", **call).images  # type: ignore[operator]
    theirs = pipeline(PROMPTS, output_type="np", **call).images * 255  # type: ignore[operator]
    pipeline.scheduler = original  # type: ignore[attr-defined]
    assert (x0 - theirs_x0).abs().max() < 1e-4
    assert np.abs(ours - theirs).max() <= 1.0
    assert ours.dtype == np.uint8 and ours.shape == (5, 16, 16, 3)
    assert (ours[0] != ours[4]).any(), "two samples of a prompt start from different noise"


def test_batch_size_does_not_matter(pipeline: object) -> None:
    drawn, sampler = [], make_sampler(pipeline)
    for batch_size in (1, 3, 64):
        draw = Draw(make_schedule("dpmpp_2m", 5, 3.0), Guidance(4.5), batch_size)
        drawn.append(torch.cat(list(sampler.batches(PROMPTS, draw, first=0, seed=0))))
    assert torch.allclose(drawn[0], drawn[1], atol=1e-5) and torch.allclose(drawn[0], drawn[2], atol=1e-5)


def test_initial_noise_is_a_function_of_seed_draw_and_sample() -> None:
    shape, samples = (4, 3, 3), torch.arange(6)
    noise = initial_noise(shape, samples, seed=1, draw=2)
    assert torch.equal(noise[3:], initial_noise(shape, samples[3:], seed=1, draw=2))
    others = [initial_noise(shape, samples, seed=1, draw=3), initial_noise(shape, samples, seed=2, draw=2)]
    assert all(not torch.equal(noise, other) for other in others)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 6


def test_each_prompt_is_encoded_once_and_alike(pipeline: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated prompts cost nothing, and an embedding does not depend on what was asked for beside it."""
    calls = []
    original = pipeline.encode_prompt  # type: ignore[attr-defined]
    monkeypatch.setattr(pipeline, "encode_prompt", lambda text, *a, **k: calls.append(text) or original(text, *a, **k))
    encoder = PromptEncoder(pipeline, max_sequence_length=9)
    together = encoder(["a cat", "a dog", "a cat"])
    assert calls == ["a cat", "a dog", ""]
    assert together.index.tolist() == [0, 1, 0] and together.rows["prompt"].shape == (3, 12 + 9, 48)
    prompt, pooled = together.gathered().values()
    assert torch.equal(prompt[0], prompt[2]) and pooled.shape == (3, 32)
    assert torch.equal(PromptEncoder(pipeline, 9)(["a dog"]).rows["prompt"][0], prompt[1])


def test_forgotten_prompts_are_encoded_again(pipeline: object) -> None:
    encoder = PromptEncoder(pipeline, max_sequence_length=9, memory_mib=0)
    first = encoder(["a cat"])
    assert not encoder.memory
    assert torch.equal(encoder(["a cat"]).rows["prompt"], first.rows["prompt"])


def test_resolution(pipeline: object) -> None:
    family = family_of(pipeline.transformer)  # type: ignore[attr-defined]
    assert latent_shape(family, None) == (16, 8, 8)
    assert latent_shape(family, 24) == (16, 12, 12)
    for wrong in (18, 68):
        with pytest.raises(
            UserError, match=f"rollout.resolution {wrong}: this model draws multiples of 4 up to 64 pixels"
        ):
            latent_shape(family, wrong)


def test_prompts_are_held_once(pipeline: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 samples of 8 prompts of SD3.5-Medium's size in bf16, whole and in any parts: 13 MB, where a row a sample
    would take 215."""
    encoded = torch.zeros(1, 205, 4096, dtype=torch.bfloat16), torch.zeros(1, 2048, dtype=torch.bfloat16)
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda *_, **__: (encoded[0].clone(), None, encoded[1].clone(), None)
    )
    text = PromptEncoder(pipeline, max_sequence_length=128)([f"prompt {n // 16}" for n in range(128)])
    again = PromptEncoder(pipeline, max_sequence_length=128)([f"prompt {n}" for n in range(8)]).repeat_interleave(16)
    for samples in (text, again):
        parts = [samples, samples[16:48], samples[torch.arange(0, 128, 3)]]
        tensors = [tensor for part in parts for tensor in (*part.rows.values(), part.index)]
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert [len(part) for part in parts] == [128, 32, 43] and sum(held.values()) <= 16e6
        assert parts[1].index.tolist() == [1] * 16 + [2] * 16


def test_an_iteration_encodes_each_prompt_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing is remembered and a rollout takes several batches; the empty prompt is encoded before."""
    trainer = Trainer(build(configure(["small.yaml", "--rollout.batch-size", "3"])))
    encoded, encode = [], trainer.encoder._encode
    trainer.encoder.memory_bytes, trainer.encoder.cache = 0, None
    monkeypatch.setattr(trainer.encoder, "_encode", lambda text: encoded.append(text) or encode(text))
    trainer.prepare(workspace, lambda: False)
    trainer.console.start_training(0, 1)
    try:
        trainer.step()
    finally:
        trainer.close()
    assert encoded and len(encoded) == len(set(encoded))
