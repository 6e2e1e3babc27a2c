"""`python -m dgpo_fast.evaluate` a second time: what fails, changes, or was trained further in the meantime."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.folder import EvaluationFolder
from dgpo_fast.train import train
from tests.evaluation.cases import DRAWING, PROMPTS, SMALL, TRAINING, index
from tests.pipelines import save_random_pipeline


class Flaky:
    """Fails on birds until it is mended."""

    needs_real_pictures = True

    broken = "birds"

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        if self.broken in prompts[0]:
            raise RuntimeError("no answer")
        return images.mean((1, 2, 3)) / 255


def none_at_all(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> None:
    """Returns no scores."""


def test_a_reward_is_tried_out_before_a_picture_is_drawn(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"tried out on 1 coloured square for .* returned None instead of 1 score: fix"):
        evaluate(["model", *DRAWING, "--rewards", f"{__name__}:none_at_all", "--output", "out"])
    assert not (workspace / "out").exists()


def test_a_failed_score_is_no_zero_and_is_tried_again(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["model", *DRAWING, "--rewards", f"{__name__}:Flaky", "jpeg", "--output", "out"]
    monkeypatch.setattr(Flaky, "broken", "")  # every prompt
    with pytest.raises(UserError, match=r"no image of the first batch could be scored; .*no answer"):
        evaluate(args)
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    assert evaluate(args) == 0
    lines = index(workspace / "out")
    birds = lines[PROMPTS.index("two birds")]
    assert birds["reward"] is None and birds["scores"][f"{__name__}:Flaky"] is None and birds["scores"]["jpeg"] < 0
    results = json.loads((workspace / "out/results.json").read_text())
    others = [line["reward"] for line in lines if line is not birds]
    assert results["images_failed_count"] == 1
    assert results["scores"]["reward"]["score_mean"] == pytest.approx(np.mean(others))
    assert (
        "not scored: 1 of 6 images, which the same command tries again; the first failure: " in capsys.readouterr().out
    )
    monkeypatch.setattr(Flaky, "broken", "no such prompt")
    assert evaluate(args) == 0
    assert all(line["reward"] is not None for line in index(workspace / "out"))
    assert json.loads((workspace / "out/results.json").read_text())["drawn_count"] == 0


def test_the_same_folder_takes_the_same_evaluation_only(workspace: Path, random_pipeline: Path) -> None:
    """Other settings, prompts or weights are refused in one line; batch size and device may change."""
    args = ["model", *SMALL, "--output", "out"]
    evaluate(args)
    for change, line in {
        "--guidance-scale 3": "out was made with guidance_scale 2.0, not 3.0: choose another --output",
        "--rewards shapes": r"out was made with rewards \['jpeg'\], not \['jpeg', 'shapes'\]: ",
        "--seed 1": "out was made with seed 0, not 1: ",
    }.items():
        with pytest.raises(UserError, match=line):
            evaluate([*args, *change.split()])
    assert evaluate([*args, "--batch-size", "3"]) == 0
    (workspace / "prompts.txt").write_text("\n".join([*PROMPTS[:-1], "a lake"]))
    with pytest.raises(UserError, match="out: the prompts changed since it was made: choose another --output"):
        evaluate(args)
    (workspace / "prompts.txt").write_text("\n".join(PROMPTS))
    (workspace / "model").unlink()
    (workspace / "model").mkdir()
    save_random_pipeline(workspace / "model", seed=1)
    with pytest.raises(UserError, match="out: the model's weights changed since it was made: choose another --output"):
        evaluate(args)


def test_scores_of_another_reward_of_the_same_name_are_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its module has changed: the folder does not go on, and two folders are not set side by side."""
    monkeypatch.syspath_prepend(str(workspace))
    module = workspace / "own_scores.py"
    module.write_text("def mean(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    args = ["model", *SMALL, "--rewards", "own_scores:mean", "--output"]
    assert evaluate([*args, "old"]) == 0
    assert evaluate([*args, "old"]) == 0
    module.write_text(module.read_text().replace("mean((", "max(("))
    with pytest.raises(UserError, match=r"^old: the content of own_scores:mean changed since it was made: choose an"):
        evaluate([*args, "old"])
    assert evaluate([*args, "new"]) == 0
    with pytest.raises(UserError, match="they were scored with another content of own_scores:mean; evaluate one of"):
        evaluate(["--side-by-side", "old", "new"])
    sys.modules.pop("own_scores")


@pytest.mark.parametrize("trained", ["lora_sha256", "weights_sha256"])
def test_a_run_that_was_trained_further_is_said_to_be(trained: str, tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path / "evaluations/colour")
    made_with = {
        "model": "runs/colour",
        "lora": None,
        "weights": "after",
        "rewards": ["jpeg"],
        "seed": 0,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "images_count": 1,
        "weights_sha256": "a",
    }
    made_with[trained] = "b"
    folder.begin(made_with).release()
    with pytest.raises(UserError) as caught:
        folder.require_same({**made_with, trained: "c"})
    assert str(caught.value) == (
        f"runs/colour has been trained further since {folder.path} was made: remove that folder, or choose "
        "another --output"
    )
    folder.require_same({**made_with, trained: "c"}, renew=True)
    with pytest.raises(UserError, match="was made with seed 0, not 1: "):
        folder.require_same({**made_with, "seed": 1, trained: "c"}, renew=True)


@pytest.mark.parametrize("what", ["lora", "full"])
def test_evaluate_train_further_and_evaluate_again(
    what: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What this command named is made again, said in one line; what the user named is left alone."""
    (workspace / "small.yaml").write_text(yaml.safe_dump({**TRAINING, "model": str(workspace / "model")}))
    train(["small.yaml", "--name", "run", "--policy.train", what])
    assert evaluate(["--side-by-side", "runs/run"]) == 0
    assert evaluate(["runs/run", "--output", "mine"]) == 0
    (workspace / "evaluations/run/notes.txt").write_text("of the user's\n")
    first = (workspace / "mine/index.jsonl").read_bytes()
    train(["--resume", "runs/run", "--iterations", "3"])
    look = capsys.readouterr().out.splitlines()[-2]
    assert look == "look: python -m dgpo_fast.evaluate --side-by-side runs/run"
    with pytest.raises(
        UserError, match=r"^runs/run has been trained further since mine was made: remove that folder, "
    ):
        evaluate(["runs/run", "--output", "mine"])
    assert (workspace / "mine/index.jsonl").read_bytes() == first
    assert evaluate(look.split()[4:]) == 0
    said = "runs/run has been trained further since evaluations/run was made: it is made again"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    assert evaluate(["runs/run", "--output", "fresh"]) == 0
    for name in ("index.jsonl", "images/000000.png"):
        again, fresh = ((workspace / folder / name).read_bytes() for folder in ("evaluations/run", "fresh"))
        assert again == fresh
    assert (workspace / "evaluations/run/index.jsonl").read_bytes() != first
    assert (workspace / "evaluations/run/notes.txt").exists(), "nothing is removed but what this command made"
    assert evaluate(["runs/run"]) == 0
    assert json.loads((workspace / "evaluations/run/results.json").read_text())["drawn_count"] == 0


def test_side_by_side_refuses_the_second_folder_before_it_draws_the_first(workspace: Path) -> None:
    (workspace / "small.yaml").write_text(yaml.safe_dump({**TRAINING, "model": str(workspace / "model")}))
    train(["small.yaml", "--name", "run"])
    evaluate(["runs/run", "--guidance-scale", "3"])
    with pytest.raises(UserError, match=r"^evaluations/run was made with guidance_scale 3.0, not 2.0: choose another"):
        evaluate(["--side-by-side", "runs/run"])
    assert not (workspace / "evaluations/run-before").exists()
