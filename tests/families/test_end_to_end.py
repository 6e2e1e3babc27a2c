"""Whole runs on a family's small pipeline: trained, resumed, evaluated, and drawn by diffusers without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.rollout.sampler import initial_noise
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.seeds import stream_seed
from dgpo_fast.train import train
from tests.families.case import Case
from tests.families.test_pictures import CASES
from tests.runs import untimed

EVERY = bool(os.environ.get("DGPO_FAST_EVERY_FAMILY"))
"""Set in the environment: all families, with LoRA and in full. Else one is enough."""
# diffusers' pipeline of Chroma has the shipped mask alone.
DRAWN = [case for case in CASES if case.name != "chroma-masked"]
RUNS = [(case, what) for case in DRAWN for what in ("lora", "full") if EVERY or (case.name, what) == ("flux1", "lora")]
PROMPTS = "a cat\na dog\na house\nbig red car\ntwo birds\na tree\na river\na boat\n"
STEPS = 3
PLAIN_DIFFUSERS = """
import sys
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

pipe = DiffusionPipeline.from_pretrained({model!r})
if {lora!r}:
    pipe.load_lora_weights({lora!r})
noise = load_file("noise.safetensors")["noise"]
if pipe.transformer.config.in_channels == 4 * noise.shape[1]:
    noise = pipe._pack_latents(noise, *noise.shape)
images = pipe(prompt={prompts!r}, latents=noise, output_type="pt", **{options!r}).images
save_file({{"images": images.contiguous()}}, "images.safetensors")
assert not any(name.startswith(("dgpo_fast", "dgpo_kernels")) for name in sys.modules)
"""


def settings(case: Case) -> dict[str, Any]:
    height, width = case.size
    drawn = {"solver": case.solver, "num_inference_steps": STEPS, "guidance_scale": scale_of(case)}
    return {
        "model": "model",
        "family": case.family,
        "prompts": "prompts.txt",
        "rewards": ["jpeg"],
        "iterations": 2,
        "device": "cpu",
        "rollout": {
            **drawn,
            "group_size": 3,
            "groups": 2,
            "resolution": f"{height}x{width}",
            "max_sequence_length": case.length,
            "batch_size": 4,
        },
        "dgpo": {"timesteps": 2, "high_noise_steps": 2, "beta": 1000.0, "kl_guidance_scale": 1.0},
        "policy": {"lora_rank": 4, "lora_alpha": 8.0, "micro_batch": 4, "allow_distilled": True},
        "optimizer": {"lr_decay": "none"},
        "ema": {"eval_every": 1},
        "evaluation": {**drawn, "images": 4},
        "checkpoint": {"every": 1},
    }


def scale_of(case: Case) -> float:
    return max(1.0, *case.scales.values())


@pytest.mark.parametrize(("case", "what"), RUNS, ids=[f"{case.name}-{what}" for case, what in RUNS])
def test_a_run_is_resumed_and_its_pictures_are_drawn_by_plain_diffusers(
    case: Case, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, a run has the metrics of one that was not stopped; what it saves gives its last pictures to 1/255."""
    monkeypatch.chdir(tmp_path)
    case.make().save_pretrained("model")
    Path("prompts.txt").write_text(PROMPTS)
    Path("small.yaml").write_text(yaml.safe_dump(settings(case)))
    trained = ["small.yaml", "--policy.train", what, "--optimizer.lr", "0.05" if what == "lora" else "3e-3"]
    assert train([*trained, "--name", "whole"]) == 0
    assert train([*trained, "--name", "run", "--iterations", "1"]) == 0
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    run = Path("runs/run")
    assert len(read_metrics(run / "metrics.jsonl")) == 2
    assert untimed(run) == untimed(Path("runs/whole"))
    after, before = (Evaluation.load(run / f"evaluation_{when}.npz") for when in ("after", "before"))
    assert evaluate(["runs/run"]) == 0
    lines = map(json.loads, Path("evaluations/run/index.jsonl").read_text().splitlines())
    assert [line["reward"] for line in lines] == pytest.approx(after.rewards, abs=1e-4)
    drawn = draw_by_diffusers(case, after, run, what)
    assert np.abs(drawn - after.images).max() <= 1.0
    assert np.abs(drawn - before.images).max() > 5.0, "the saved weights matter to these pictures"


def own_options(case: Case, count: int) -> dict[str, Any]:
    """How a family's pipeline is told of guidance for `count` pictures, and to draw the size that it is asked for."""
    if case.name in ("qwen_image", "flux1-guided"):
        return {"true_cfg_scale": scale_of(case), "negative_prompt": [""] * count}
    binning = {"use_resolution_binning": False} if case.name == "sana" else {}
    return {"guidance_scale": scale_of(case), **binning}


def draw_by_diffusers(case: Case, evaluation: Evaluation, run: Path, what: str) -> np.ndarray:
    """Its pictures, (B, height, width, 3) in [0, 255], from what `run` has saved, in a fresh process."""
    height, width = case.size
    family = case.family_of(case.make(), Path("again"))
    count = torch.arange(len(evaluation.prompts))
    noise = initial_noise(family.latent_shape(height, width), count, seed=stream_seed(0, "evaluation"), draw=0)
    save_file({"noise": noise}, "noise.safetensors")
    script = PLAIN_DIFFUSERS.format(
        model="model" if what == "lora" else str(run),
        lora=str(run) if what == "lora" else "",
        prompts=[prompt.text for prompt in evaluation.prompts],
        options={
            "num_inference_steps": STEPS,
            **own_options(case, len(evaluation.prompts)),
            "max_sequence_length": case.length,
            "height": height,
            "width": width,
        },
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file("images.safetensors")["images"].permute(0, 2, 3, 1).numpy() * 255
