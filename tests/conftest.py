"""Shared by all tests: a small random pipeline of SD3.5's full architecture."""

from pathlib import Path

import pytest
import torch

from tests.pipelines import save_random_pipeline


@pytest.fixture(scope="session")
def random_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained pipeline with three text encoders, a 16-channel VAE and dual attention."""
    folder = tmp_path_factory.mktemp("random_pipeline")
    with torch.random.fork_rng():
        save_random_pipeline(folder)
    return folder
