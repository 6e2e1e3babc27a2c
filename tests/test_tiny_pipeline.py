"""The committed pipeline: its folder, its architecture and how well it draws before any reinforcement."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dgpo_fast.rewards.shipped.ocr import OcrReward
from dgpo_fast.tiny import PIPELINE_DIR, data
from dgpo_fast.tiny.pretrain import sample
from dgpo_fast.tiny.shapes import ShapesReward


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    # Diffusers' documented way to load an SD3 pipeline without its T5 encoder.
    return StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, text_encoder_3=None, tokenizer_3=None)


def test_folder_is_small_and_free_of_pickles():
    files = [f for f in PIPELINE_DIR.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt"}


def test_architecture_is_sd35_mediums(pipe: StableDiffusion3Pipeline):
    transformer, vae = pipe.transformer.config, pipe.vae.config
    assert transformer.qk_norm == "rms_norm" and len(transformer.dual_attention_layers) >= 1
    assert transformer.patch_size == 2 and transformer.in_channels == vae.latent_channels
    assert not vae.use_quant_conv and not vae.use_post_quant_conv
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
    assert {m.dtype for m in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float32}
    assert pipe.scheduler.config.shift == 3.0


def test_latents_have_unit_variance(pipe: StableDiffusion3Pipeline):
    rng = np.random.default_rng(0)
    pictures = np.stack([data.render(m, rng) for _, m in data.balanced(data.all_prompts(), 96)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean
    x0 = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert abs(x0.mean()) < 0.1 and 0.8 < x0.std() < 1.2


def test_autoencoder_keeps_what_the_reward_sees(pipe: StableDiffusion3Pipeline):
    rng = np.random.default_rng(1)
    prompts = data.balanced(data.shape_prompts("heldout"), 96)
    texts, metadata = [t for t, _ in prompts], [m for _, m in prompts]
    pictures = np.stack([data.render(m, rng) for m in metadata])
    with torch.no_grad():
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    images = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).numpy()
    assert ShapesReward()(images, texts, metadata)[0].mean() > 0.95


def test_heldout_scores_leave_room_to_learn(pipe: StableDiffusion3Pipeline):
    prompts = data.balanced(data.shape_prompts("heldout"), 192)
    texts, metadata = [t for t, _ in prompts], [m for _, m in prompts]
    graded, _ = ShapesReward()(sample(pipe, texts, seed=0), texts, metadata)
    tags = np.array([m["tag"] for m in metadata])
    assert 0.4 <= graded.mean() <= 0.7
    for tag in data.TAGS:
        assert graded[tags == tag].mean() > 0.2, tag
    assert json.loads((PIPELINE_DIR / "pretraining.json").read_text())["heldout"]["unguided"][
        "graded"
    ] == pytest.approx(graded.mean(), abs=0.1)


def test_signs_leave_room_to_learn(pipe: StableDiffusion3Pipeline):
    prompts = [text for text, _ in data.sign_prompts("heldout")[:96]]
    scores, _ = OcrReward()(sample(pipe, prompts, seed=0), prompts, [{}] * len(prompts))
    assert 0.2 <= scores.mean() <= 0.6


def test_samples_of_a_prompt_differ_in_reward(pipe: StableDiffusion3Pipeline):
    prompts = data.balanced(data.shape_prompts("train"), 12)
    texts = [text for text, _ in prompts for _ in range(8)]
    metadata = [m for _, m in prompts for _ in range(8)]
    graded, _ = ShapesReward()(sample(pipe, texts, seed=0), texts, metadata)
    # Group-relative advantages need groups that are neither all right nor all wrong.
    assert np.mean(graded.reshape(12, 8).std(1) > 0) >= 0.75


def test_pictures_do_not_depend_on_the_number_of_t5_slots(pipe: StableDiffusion3Pipeline):
    prompts = data.balanced(data.shape_prompts("heldout"), 96)
    texts, metadata = [t for t, _ in prompts], [m for _, m in prompts]
    reward = ShapesReward()
    few, many = (reward(sample(pipe, texts, 0, max_sequence_length=n), texts, metadata)[0].mean() for n in (0, 16))
    assert abs(few - many) < 0.1
