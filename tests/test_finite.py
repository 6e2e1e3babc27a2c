"""Models whose numbers are not finite: a picture that is not finite fails by name and is never scored."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dgpo_fast.config.command_line import run_command
from dgpo_fast.distributed import ALONE, SharedError
from dgpo_fast.distributed.guard import StepGuard
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.models.finite import watched
from dgpo_fast.models.latents import find_faults
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import load_rewards
from dgpo_fast.rewards.pool.pool import RewardPool
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.train import train
from dgpo_fast.wording import FAULTS, number
from tests.evaluation.cases import DRAWING, index

NAN, INFINITY = float("nan"), float("inf")


def test_what_is_wrong_with_a_picture() -> None:
    """Of each its own: latents before pixels, NaN before infinity."""
    latents, pixels = torch.zeros(6, 2, 4, 4), torch.zeros(6, 3, 8, 8)
    latents[1, 1, 3, 3] = NAN
    pixels[1] = NAN
    latents[2, 0, 0, 0] = -INFINITY
    pixels[3, 2, 7, 7] = NAN
    pixels[3, 0] = INFINITY
    pixels[4, 1, 0, 0] = INFINITY
    faults = find_faults(latents, pixels)
    assert faults.dtype == torch.uint8
    assert [FAULTS[fault] for fault in faults] == [
        "",
        "the transformer gave NaN",
        "the transformer gave infinity",
        "the decoder gave NaN",
        "the decoder gave infinity",
        "",
    ]


class Asked:
    """Scores pictures by their first pixel, which it keeps."""

    needs_real_pictures = True
    seen: ClassVar[list[int]] = []

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        first = images[:, 0, 0, 0].tolist()
        Asked.seen += first
        return np.array(first, float)


def test_a_group_that_is_not_finite_is_never_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the images come in, and on the way without a pool."""
    images = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    faults = np.array([0, 0, 0, 0, 3, 0, 0, 0, 0], np.uint8)
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    reward = load_rewards([f"{__name__}:Asked"])
    pool = RewardPool(reward, workers=0, deadline_s=60.0, device=torch.device("cpu"), note=lambda line: None)
    scoring = pool.start(prompts, 3)
    for rows in (slice(0, 5), slice(5, 9)):
        scoring.add(images[rows], faults[rows])
    for scores in (scoring.result(), reward.score_groups(images, prompts, 3, faults)):
        assert scores.valid.tolist() == scores.finite.tolist() == [True, False, True]
        assert scores.rewards[0].tolist() == [0, 1, 2] and np.isnan(scores.rewards[1]).all()
        assert np.isnan(scores.parts[f"{__name__}:Asked"][1]).all()
        assert scores.faults.tolist() == [[0, 0, 0], [0, 3, 0], [0, 0, 0]] and not scores.failures
    pool.close()
    assert set(Asked.seen) == {0, 1, 2, 6, 7, 8}


def spoilt(folder: Path, part: str, stem: str, factor: float) -> Path:
    """The model in `folder`, with one weight times `factor`: finite, while what it computes is not."""
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[stem] = tensors[stem] * factor
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def model(random_pipeline: Path, workspace: Path) -> Path:
    """A copy of the random pipeline, to be changed."""
    return Path(shutil.copytree(random_pipeline, workspace / "model"))


OVERFLOWS = {
    "transformer": ("transformer", "transformer_blocks.1.ff.net.2.weight", "the transformer gave ", "ff.net.2"),
    "decoder": ("vae", "decoder.conv_out.weight", "the decoder gave ", "decoder's conv_out"),
}
"""Part → its folder, the weight that is spoilt, what is said, and the layer that is named."""


@pytest.mark.parametrize("part", OVERFLOWS)
def test_a_model_that_overflows_is_refused_before_it_is_trained(part: str, model: Path, workspace: Path) -> None:
    folder, stem, fault, layer = OVERFLOWS[part]
    spoilt(model, folder, stem, 3e38)
    with pytest.raises(UserError) as caught:
        train(["small.yaml", "--model", "model"])
    line = str(caught.value)
    assert line.startswith("no image of the evaluation is finite; the first: picture 0: " + fault), line
    assert line.endswith(f"{layer}: the model fails in fp32 already, so use another one") and ", first in the " in line
    assert not (workspace / "runs/run").exists(), "nothing was trained"


@pytest.mark.parametrize("part", OVERFLOWS)
def test_an_evaluation_of_black_pictures_alone_fails(
    part: str, model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, stem, fault, layer = OVERFLOWS[part]
    spoilt(model, folder, stem, 3e38)
    args = ["model", *DRAWING, "--rewards", f"{__name__}:Asked", "--output", "out"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *args])
    Asked.seen.clear()
    assert run_command(evaluate) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no image of the first batch is finite; the first: picture 0: " + fault)
    assert f"{layer}: the model fails in fp32" in line
    assert not Asked.seen


def test_the_first_layer_is_named_though_all_after_it_fail_too() -> None:
    """Also of compiled layers, and nothing is left in the model."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    torch.nn.init.constant_(layers[0].weight, 1.0)
    torch.nn.init.constant_(layers[1].weight, 3e38)
    layers[1].compile(backend="aot_eager")
    with watched(part=layers) as found:
        layers(torch.full((1, 2), 100.0))
    assert found == ["the part's 1"]
    assert not any(layer._forward_hooks for layer in layers.modules())
    with watched(part=layers) as found:
        layers(torch.zeros(1, 2))
    assert not found


def test_text_encoders_that_overflow_are_named(model: Path, workspace: Path) -> None:
    """As T5 does in half precision; nothing is kept of the prompt."""
    file = model / "text_encoder_3/model.safetensors"
    tensors = load_file(file)
    name = "encoder.final_layer_norm.weight"
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^the text encoders gave NaN or infinity for the prompt '.*': the"):
        train(["small.yaml", "--model", "model"])
    with pytest.raises(UserError, match=r"^the text encoders gave NaN or infinity for the prompt '.*': the"):
        train(["small.yaml", "--model", "model", "--name", "again"])


class Breaking:
    """Latents of some pictures become NaN, as those of a model do that overflows on a few prompts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, numbers: set[int]):
        original = Sampler.latents

        def latents(sampler: Sampler, text, samples, draw, **more):  # type: ignore[no-untyped-def]
            x0 = original(sampler, text, samples, draw, **more)
            x0[[int(sample) in numbers for sample in samples]] = NAN
            return x0

        monkeypatch.setattr(Sampler, "latents", latents)


def test_the_other_pictures_of_an_evaluation_count(
    workspace: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The failed ones are named, in the table's mean are the others, and the same command scores none of them."""
    args = [str(random_pipeline), *DRAWING, "--rewards", "jpeg", "--output", "out"]
    Breaking(monkeypatch, {1, 3})
    for _ in range(2):
        assert evaluate(args) == 0
        assert (
            "not finite, so not scored: 2 of 10 images: picture 1: the transformer gave NaN; picture 3: the "
            "transformer gave NaN\n"
        ) in re.sub(r"(?<!\n)\n(?! )", "\n", capsys.readouterr().out)
        lines, results = index(workspace / "out"), json.loads((workspace / "out/results.json").read_text())
        assert [line["sample"] for line in lines if line.get("fault")] == [1, 3]
        assert all((line["reward"] is None) == (line["sample"] in (1, 3)) for line in lines)
        assert (results["images_not_finite_count"], results["images_failed_count"]) == (2, 2)
        assert results["scores"]["jpeg"]["images_count"] == 8


def test_a_run_drops_the_groups_and_counts_the_pictures(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three groups of four, the second has two pictures that are not finite, and of the evaluation's twelve two."""
    Breaking(monkeypatch, {5, 6})
    assert train(["small.yaml", "--iterations", "2"]) == 0
    lines = read_metrics(workspace / "runs/run/metrics.jsonl")
    assert [line["images_not_finite_count"] for line in lines] == [2, 2]
    assert [line["groups_dropped_count"] for line in lines] == [1, 1]
    assert all(np.isfinite(line["loss"]) and line["steps_skipped_count"] == 0 for line in lines)
    summary = json.loads((workspace / "runs/run/summary.json").read_text())
    assert summary["images_not_finite_count"] == 4
    assert summary["before"]["images_not_finite"] == summary["after"]["images_not_finite"] == 2
    out = capsys.readouterr().out
    assert "evaluation: 2 images could not be scored; the first: picture 5: the transformer gave NaN (prompt " in out
    assert re.search(
        r"iteration 1: group dropped: prompt '.*' \(prompts.txt:\d+\): picture 2 of 4: the transformer gave NaN \(1 "
        r"more of the group are not finite\)",
        out,
    )


@pytest.mark.parametrize("source", ["online", "offline"])
def test_a_policy_without_finite_pictures_ends_the_run_at_once(
    source: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not blame the reward, nor wait for three such iterations."""
    original = Sampler.batches  # those of evaluations are finite

    def batches(*args, **kwargs):  # type: ignore[no-untyped-def]
        with monkeypatch.context() as undone:
            undone.setattr(Sampler, "latents", plain)
            yield from original(*args, **kwargs)

    plain = Sampler.latents
    Breaking(monkeypatch, {0, 4, 8})
    monkeypatch.setattr(Sampler, "batches", batches)
    with pytest.raises(UserError) as caught:
        train(["small.yaml", "--data.source", source, "--data.offline-groups", "6"])
    line = str(caught.value)
    where = {"online": "iteration 1: every group", "offline": "runs/run/groups: every group of a file"}[source]
    assert line.startswith(f"{where} has pictures that are not finite; the first: prompt '")
    assert line.endswith(
        "picture 1 of 4: the transformer gave NaN: the model fails in fp32 already, so use another one"
    )
    assert not list((workspace / "runs/run").glob("groups/*.safetensors"))
    metrics = workspace / "runs/run/metrics.jsonl"
    assert not metrics.exists() or not read_metrics(metrics), "nothing was trained"


@pytest.mark.parametrize(
    ("dtype", "taken", "remedy"),
    [
        (torch.float32, True, "resume with a lower --optimizer.lr"),
        (torch.bfloat16, True, "resume with a lower --optimizer.lr or --precision fp32"),
        (torch.float32, False, "the model fails in fp32 already, so use another one"),
        (torch.bfloat16, False, "use --precision fp32, or another model"),
    ],
)
def test_the_advice_fits_the_run(dtype: torch.dtype, taken: bool, remedy: str) -> None:
    guard = StepGuard(2, ALONE, dtype, lambda line: None)
    fine, bad = torch.tensor(1.0), torch.tensor(NAN)
    if taken:
        assert guard.allows(fine, fine, 1)
    assert not guard.allows(bad, bad, 1 + taken)
    with pytest.raises(SharedError, match=rf", the 2\. in a row: {re.escape(remedy)}$"):
        guard.allows(bad, bad, 2 + taken)


def test_a_tag_without_a_score_has_a_dash() -> None:
    assert (number(NAN), number(NAN, sign="+"), number(0.5, sign="+")) == ("–", "–", "+0.500")


def test_old_runs_without_the_count_are_read(workspace: Path) -> None:
    """Metrics and evaluations of earlier versions say nothing of pictures that are not finite."""
    assert train(["small.yaml", "--iterations", "1", "--optimizer.lr-decay", "none"]) == 0
    run = workspace / "runs/run"
    (line,) = read_metrics(run / "metrics.jsonl")
    del line["images_not_finite_count"]
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with np.load(run / "evaluation_before.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "not_finite"}
    np.savez_compressed(run / "evaluation_before.npz", **arrays)
    assert yaml.safe_load((run / "config.yaml").read_text())["iterations"] == 1
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    assert json.loads((run / "summary.json").read_text())["images_not_finite_count"] == 0
