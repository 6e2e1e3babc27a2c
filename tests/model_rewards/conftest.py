"""Models that several files of tests read."""

from functools import cache
from pathlib import Path

import pytest
import torch

from dgpo_fast.rewards.device import on_device
from tests.model_rewards import models as small
from tests.model_rewards.cases import TAUGHT, UNTRAINED


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


@pytest.fixture(scope="session")
def taught(folder):
    """Models by name, taught when one is first asked for; tests undo what they change."""

    @cache
    def made(name):
        with torch.random.fork_rng(), on_device(torch.device("cpu")):
            torch.manual_seed(0)
            return TAUGHT[name](folder)

    return made
