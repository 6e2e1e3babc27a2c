"""The fast decoder: the plain one's pictures, checked against fp32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from dgpo_fast.engine import compile
from dgpo_fast.engine.decoder import Decoder
from dgpo_fast.engine.upsampling import PhasedUpsample
from dgpo_fast.models.latents import decode_pixels, decode_plainly, to_uint8
from dgpo_fast.models.loading import load_pipeline

CPU = torch.device("cpu")
LATENTS = torch.randn(7, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def load_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    return load_pipeline(str(folder), revision=None, device=CPU, dtype=dtype).vae


def make_decoder(vae: AutoencoderKL, compiled: bool = False, way: str = "fast") -> tuple[Decoder, list[str]]:
    notes: list[str] = []
    decoder = Decoder(vae, 3, way=way, compiled=compiled, overlap=True, note=notes.append)
    return decoder, notes


@pytest.mark.parametrize("way", ["fast", "phases"])
@pytest.mark.parametrize("compiled", [False, True])
def test_same_pictures_as_the_plain_decoder(
    compiled: bool, way: str, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one of 255; with a partial last batch. The pipeline's own decoder stays as it was."""
    monkeypatch.setattr(compile, "BACKEND", "aot_eager")
    vae = load_vae(random_pipeline, torch.float32)
    expected = decode_plainly(vae, LATENTS, 7).images
    decoder, notes = make_decoder(vae, compiled, way)
    found = decoder(LATENTS).images
    assert found.dtype == np.uint8 and found.shape == expected.shape == (7, 16, 16, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert all(weight.is_contiguous() for weight in vae.parameters())
    assert not decoder.overlaps, "a CPU has no stream to decode on"
    assert len(notes) == (compiled or way == "phases")


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3), (8, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_phases_are_the_convolution_of_the_upsampled_picture(size: tuple[int, int], bias: bool) -> None:
    """At the borders too, where the padding is that of the large picture. 16 products stand for 36."""
    torch.manual_seed(0)
    plain = Upsample2D(6, use_conv=True, out_channels=4, bias=bias).double().requires_grad_(False)
    x = torch.randn(3, 6, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    phased = PhasedUpsample(plain)
    with FlopCounterMode(display=False) as of_plain:
        expected = plain(x)
    with FlopCounterMode(display=False) as of_phases:
        found = phased(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    height, width = size
    positions = (height + 1) * (width + 1) / (height * width)  # one row and one column more than pixels
    assert of_phases.get_total_flops() == pytest.approx(of_plain.get_total_flops() * 16 / 36 * positions)


def test_all_upsampling_is_in_phases(random_pipeline: Path) -> None:
    vae = load_vae(random_pipeline, torch.float32)
    decoder, _ = make_decoder(vae, way="phases")
    upsampling = [
        sum(isinstance(m, kind) for m in decoder.vae.decoder.modules()) for kind in (Upsample2D, PhasedUpsample)
    ]
    assert upsampling == [0, len(vae.config.block_out_channels) - 1]
    assert any(isinstance(module, Upsample2D) for module in vae.decoder.modules()), "the pipeline's own stays"


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
    assert np.array_equal(found[:3], to_uint8(decode_pixels(vae, LATENTS[:3])).numpy())
