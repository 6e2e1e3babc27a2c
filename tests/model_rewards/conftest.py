"""Models that several files of tests read."""

from pathlib import Path

import pytest
import torch

from tests.model_rewards import models as small
from tests.model_rewards.cases import UNTRAINED


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One untrained model of every kind."""
    folder = tmp_path_factory.mktemp("models")
    small.save_clip(folder / "clip")
    small.save_mask2former(folder / "mask2former")
    small.save_bert_tokenizer(folder / "bert")
    torch.save(small.predictor_weights(), folder / "predictor.pth")
    torch.save(small.image_reward_weights(), folder / "BLIP.pt")
    half = {key: value.half() for key, value in small.open_clip_weights().items()}
    torch.save({"state_dict": half}, folder / "HPS.pt")
    return folder


@pytest.fixture(scope="session")
def untrained(folder):
    made = {name: make(folder) for name, make in UNTRAINED.items()}
    return made.__getitem__
