"""The fast decoder: the plain one's pictures, checked against fp32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dgpo_fast.engine import compile
from dgpo_fast.engine.decoder import Decoder
from dgpo_fast.models.latents import decode_pixels, decode_plainly, to_uint8
from dgpo_fast.models.loading import load_pipeline

CPU = torch.device("cpu")
LATENTS = torch.randn(7, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def load_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    return load_pipeline(str(folder), revision=None, device=CPU, dtype=dtype).vae


def make_decoder(vae: AutoencoderKL, compiled: bool = False) -> tuple[Decoder, list[str]]:
    notes: list[str] = []
    decoder = Decoder(vae, 3, fast=True, compiled=compiled, overlap=True, note=notes.append)
    return decoder, notes


@pytest.mark.parametrize("compiled", [False, True])
def test_same_pictures_as_the_plain_decoder(
    compiled: bool, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one of 255; with a partial last batch. The pipeline's own decoder stays as it was."""
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    vae = load_vae(random_pipeline, torch.float32)
    expected = decode_plainly(vae, LATENTS, 7).images
    decoder, notes = make_decoder(vae, compiled)
    found = decoder(LATENTS).images
    assert found.dtype == np.uint8 and found.shape == expected.shape == (7, 16, 16, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert all(weight.is_contiguous() for weight in vae.parameters())
    assert not decoder.overlaps, "a CPU has no stream to decode on"
    assert len(notes) == compiled


def test_bf16_is_compared_with_fp32_once(random_pipeline: Path) -> None:
    decoder, notes = make_decoder(load_vae(random_pipeline, torch.bfloat16))
    decoder(LATENTS)
    decoder(LATENTS)
    (note,) = notes
    assert note.startswith("bfloat16 decoder: ") and note.endswith("at most") and "instead" not in note
    assert decoder.dtype == torch.bfloat16


def test_fp32_takes_over_from_a_decoder_that_overflows(random_pipeline: Path) -> None:
    """Activations beyond fp16's largest number: infinite in fp16, ordinary in fp32."""
    vae = load_vae(random_pipeline, torch.float16)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2e5)
    decoder, notes = make_decoder(vae)
    found = decoder(LATENTS).images
    assert notes == ["float16 decoder: its numbers are not finite; fp32 decodes instead"]
    assert decoder.dtype == torch.float32 and np.unique(found).size > 2


def test_fp32_takes_over_where_pictures_differ_too_much(random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgpo_fast.engine.decoder.LARGEST_MEAN_DIFFERENCE", 0.0)
    vae = load_vae(random_pipeline, torch.bfloat16)
    decoder, notes = make_decoder(vae)
    found = decoder(LATENTS).images
    assert notes[0].endswith("; fp32 decodes instead")
    vae.decoder.float()
    assert np.array_equal(found[:3], to_uint8(decode_pixels(vae, LATENTS[:3], torch.float32)).numpy())
