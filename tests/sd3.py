"""Parts of a Stable Diffusion 3 folder that carry their family, and shapes of its samples."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel

from dgpo_fast.models.architecture import read_architecture
from dgpo_fast.models.families import make_family
from dgpo_fast.models.families.sd3 import SD3, sd35_medium
from dgpo_fast.models.family import Family, attach
from dgpo_fast.models.meta import RowShape, SampleShape


def family_in(folder: Path) -> Family:
    return make_family(read_architecture(folder))


def medium() -> SD3:
    return SD3(sd35_medium())


def transformer_in(folder: Path) -> SD3Transformer2DModel:
    return attach(SD3Transformer2DModel.from_pretrained(folder / "transformer"), family_in(folder))


def vae_in(folder: Path) -> AutoencoderKL:
    return attach(AutoencoderKL.from_pretrained(folder / "vae"), family_in(folder))


def sample_shape(latent: tuple[int, ...], tokens: tuple[int, ...], pooled: int) -> SampleShape:
    return SampleShape(latent, (RowShape("prompt", tokens), RowShape("pooled", (pooled,))))


def stand_in(transformer: Any) -> Any:
    """`transformer`, any callable, which is called as Stable Diffusion 3's is."""
    transformer.dgpo_family = SimpleNamespace(velocity=partial(SD3.velocity, None), rule=None)
    return transformer
