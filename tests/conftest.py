"""Shared by all tests: a small random pipeline of SD3.5's full architecture, and settings of a run with it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from dgpo_fast.engine import attention, linear
from dgpo_fast.evaluation import figures as drawn
from dgpo_fast.evaluation import results, watch
from dgpo_fast.models.work import ModelWork, WorkMeter
from tests.browser import Browser, browser
from tests.pipelines import save_random_pipeline

PROMPTS = "a cat\na $5_{ dog\na house\nbig red car\ntwo birds\na tree\na river\na boat\na hill\na door\n"


@pytest.fixture(scope="session")
def random_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained pipeline with three text encoders, a 16-channel VAE and dual attention."""
    folder = tmp_path_factory.mktemp("random_pipeline")
    with torch.random.fork_rng():
        save_random_pipeline(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a prompt file and `small.yaml`, a run of six iterations that takes a second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    settings = {
        "model": str(random_pipeline),
        "prompts": "prompts.txt",
        "rewards": ["jpeg"],
        "iterations": 6,
        "name": "run",
        "device": "cpu",
        "rollout": {
            "group_size": 4,
            "groups": 3,
            "num_inference_steps": 4,
            "max_sequence_length": 9,
            "batch_size": 6,
            "guidance_scale": 2.0,
        },
        "dgpo": {
            "timesteps": 2,
            "high_noise_steps": 3,
            "beta": 1000.0,
            "kl_weight": 0.001,
            "kl_guidance_scale": 1.0,
            "clip_range": 0.01,
        },
        "policy": {"train": "lora", "lora_rank": 4, "lora_alpha": 8.0, "micro_batch": 8},
        "optimizer": {"lr": 0.03, "lr_decay": "none"},
        "ema": {"eval_every": 1, "switch_ema_ref": 3},
        "evaluation": {"images": 12, "num_inference_steps": 4, "guidance_scale": 2.0},
        "watch": {"every": 0, "prompts": 2, "images_per_prompt": 2},
        "checkpoint": {"every": 1, "keep": 9},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def own_prompt_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the processes that they start, leave the user's cache alone."""
    os.environ["DGPO_FAST_CACHE"] = str(tmp_path_factory.mktemp("prompt_cache"))


@pytest.fixture(scope="session", autouse=True)
def short_runs() -> Iterator[None]:
    """Runs in the tests' own process leave out what takes longer than a small training and is not what is tested.

    Figures are empty files without the fixture `figures`. FLOPs are counted once for all runs of the same shapes.
    Kernels are timed in as few rounds as possible.
    """
    counted: dict[str, ModelWork] = {}
    count = WorkMeter.model_work

    def model_work(meter: WorkMeter) -> ModelWork:
        models = meter.models
        checkpoint = meter.checkpoint and meter.checkpoint.keywords["kind"]  # type: ignore[attr-defined]
        of = (models.base.config, meter.policy, models.dtype, meter.shape)
        of += (models.adapted, models.merged, checkpoint)
        if repr(of) not in counted:
            counted[repr(of)] = count(meter)
        return counted[repr(of)]

    def leave_empty(*args: Any) -> None:
        args[-1].touch()

    with (
        patch.multiple(results, before_after_grid=leave_empty, reward_curve=leave_empty),
        patch.multiple(watch, before_after_grid=leave_empty, progress_strip=leave_empty),
        patch.object(WorkMeter, "model_work", model_work),
        patch.dict(attention.TIMED_S, cpu=0.0),
        patch.object(linear, "TIMED_S", 0.0),
    ):
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's runs draw their figures."""
    for module, name in (
        (results, "before_after_grid"),
        (results, "reward_curve"),
        (watch, "before_after_grid"),
        (watch, "progress_strip"),
    ):
        monkeypatch.setattr(module, name, getattr(drawn, name))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of pages; for tests with the mark `needs_chromium`."""
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started
