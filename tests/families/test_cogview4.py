"""CogView4: its sizes, its grid, and the time that it reads."""

import pytest
import torch

from dgpo_fast.models.families import known_models, make_family
from dgpo_fast.models.families.cogview4 import COGVIEW4_6B, CogView4
from dgpo_fast.rollout.schedule import make_schedule


@pytest.fixture(scope="module")
def published() -> CogView4:
    family = make_family(known_models()[COGVIEW4_6B]())
    assert isinstance(family, CogView4)
    return family


def test_the_published_model_has_its_number_of_weights(published: CogView4) -> None:
    with torch.device("meta"):
        transformer, vae = published.build_transformer(), published.build_vae()
        text = published.architecture.build_text_encoder("text_encoder")
    billions = [sum(weight.numel() for weight in part.parameters()) / 1e9 for part in (transformer, text, vae)]
    assert billions == pytest.approx([6.37, 8.78, 0.4], abs=0.01)
    assert (published.size, published.largest_side) == ((1024, 1024), 2048)


@pytest.mark.parametrize(("side", "shift"), [(512, 1.75), (1024, 3.25)])
def test_the_time_that_it_reads_is_the_grids_before_the_shift(side: int, shift: float, published: CogView4) -> None:
    """In whole thousandths, from 1000 to 1, as its pipeline names its steps."""
    latent = published.latent_shape(side, side)
    grid = published.grid(7, latent)
    schedule = make_schedule("euler", 7, grid.shift, sigmas=grid.sigmas)
    assert grid.shift == shift
    read = published.before_shift(schedule.timesteps, latent)
    assert read.tolist() == [1000, 833, 667, 500, 334, 167, 1]
