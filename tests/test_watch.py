"""Looks during training: what they write, that they change nothing, and what happens when a rule fires."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.train import train
from tests.runs import untimed

LOOKS = ["small.yaml", "--watch.every", "2"]
"""Three looks after the base's, at four pictures of two prompts."""
OTHERS = ("norm-ratio", "edges", "colours", "saturation", "dark", "diversity", "grid", "together")
ALWAYS = ["--watch.brightness=1e-6", *(f"--watch.{name}=none" for name in OTHERS)]
"""Any change of the brightness is an alarm."""


def redness(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> np.ndarray:
    """A reward beside the trained one."""
    return images[..., 0].mean((1, 2)) / 255


def test_what_looks_write(workspace: Path, figures: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*LOOKS, "--watch.rewards", f"redness={__name__}:redness"]) == 0
    run = workspace / "runs" / "run"
    assert sorted(path.name for path in (run / "looks").iterdir()) == [
        *(f"{iteration:06d}.png" for iteration in (0, 2, 4, 6)),
        "base.npz",
    ]
    base = Evaluation.load(run / "looks/base.npz")
    assert base.images.shape == (4, 16, 16, 3) and len({prompt.text for prompt in base.prompts}) == 2
    column = np.asarray(Image.open(run / "looks/000000.png"))
    assert (column == np.concatenate([base.images[0], base.images[2]])).all(), "the first picture of each prompt"
    with Image.open(run / "progress.png") as strip:
        assert strip.width > 100 < strip.height
    lines = read_metrics(run / "metrics.jsonl")
    looks = [line for line in lines if "look/reward_mean" in line]
    assert [look["iteration"] for look in looks] == [2, 4, 6]
    for look in looks:
        assert look["look_s"] > 0 and look["norm_ratio"] > 0 and look["look/diversity_ratio"] > 0
        low, high = look["look/watch/redness_gain_ci95"]
        assert low <= look["look/watch/redness_gain_mean"] <= high
        mean = look["look/watch/redness_mean"] - look["look/watch/redness_gain_mean"]
        assert mean == pytest.approx(base.parts["watch/redness"].mean(), abs=1e-6)
    summary = json.loads((run / "summary.json").read_text())["watch"]
    assert summary["images"] == 4 and summary["last"]["grid_ratio"] == looks[-1]["look/grid_ratio"]
    assert "fixed prompts: " in capsys.readouterr().out


def test_looks_change_nothing_and_a_resumed_run_has_the_same(workspace: Path) -> None:
    """Weights and metrics to the last bit. A sign is looked for again in the next iteration, and an alarm that was told
    is not told again."""
    assert train(["small.yaml", "--name", "blind"]) == 0
    assert train([*LOOKS, *ALWAYS, "--watch.in-a-row=2"]) == 0
    run, blind = workspace / "runs/run", workspace / "runs/blind"
    looks = [line["iteration"] for line in untimed(run) if "look/reward_mean" in line]
    assert looks == [2, 3, 4, 6], "no third look is needed once two have agreed"
    seen = [{k: v for k, v in line.items() if not k.startswith("look/")} for line in untimed(run)]
    assert seen == untimed(blind)
    weights = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (run, blind)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    copy = workspace / "runs/copy"
    shutil.copytree(run, copy)
    for path in [*(copy / "checkpoints").iterdir(), *copy.glob("alarm-*")]:
        if path.suffix or int(path.name[-6:]) > 3:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(["--resume", str(copy)]) == 0
    assert untimed(copy) == untimed(run)
    assert (copy / "looks/000006.png").read_bytes() == (run / "looks/000006.png").read_bytes()
    assert [path.name for path in run.glob("alarm-*")] == ["alarm-000003.png"] and not list(copy.glob("alarm-*"))


def test_a_rule_warns_in_one_line_and_keeps_the_last_good_checkpoint(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([*LOOKS, *ALWAYS, "--checkpoint.keep", "1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "reward hacking" in line]
    assert line.startswith("iteration 2: signs of reward hacking: brightness ")
    assert line.endswith(
        "times the base's: look at runs/run/alarm-000002.png; the last good checkpoint is "
        "runs/run/checkpoints/iteration-000000"
    )
    kept = sorted(path.name for path in (workspace / "runs/run/checkpoints").iterdir())
    assert kept == ["iteration-000000", "iteration-000006"]


def test_a_rule_that_stops_the_run_ends_it_with_the_last_good_weights(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results are of the original model here, since the first look is no good one; resumed, the run goes on."""
    assert train([*LOOKS, *ALWAYS, "--watch.rules", "stop"]) == 0
    run = workspace / "runs/run"
    assert "the run ends with the weights of iteration 0, the last good checkpoint" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["watch"]["stopped_by_rule"] and summary["watch"]["alarms"][0]["iteration"] == 2
    assert summary["gain"]["reward_mean"] == 0 and len(read_metrics(run / "metrics.jsonl")) == 2
    assert load_newest(run / "checkpoints")[0].iteration == 2
    assert train(["--resume", "runs/run", "--watch.rules", "warn"]) == 0
    assert load_newest(run / "checkpoints")[0].iteration == 6


def test_rules_that_are_off_keep_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*LOOKS, *ALWAYS, "--watch.rules", "off", "--checkpoint.keep", "1"]) == 0
    assert "reward hacking" not in capsys.readouterr().out
    assert [path.name for path in (workspace / "runs/run/checkpoints").iterdir()] == ["iteration-000006"]
