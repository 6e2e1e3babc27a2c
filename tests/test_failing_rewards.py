"""Runs with rewards that fail, die, are mended, or tell no pictures apart."""

import json
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.rewards.registry import BUILT_IN
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.processes import finish, start
from tests.runs import untimed


class Flaky:
    """Raises, or is not a number, for two prompts, and counts what it was asked."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        if prompts[0] == "a $5_{ dog":
            raise RuntimeError("no answer")
        scores = images.mean((1, 2, 3)) / 255
        return scores * np.nan if prompts[0] == "two birds" else scores


class Constant:
    """Likes every picture alike, and fails on some prompts."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        return np.full(len(images), np.nan if prompts[0] == "two birds" else 1e6)


EQUAL = (
    "every group of 3 iterations in a row had equal rewards: nothing can be learned from them; check whether the "
    "reward distinguishes the pictures of a prompt\n"
)


class Broken:
    """Never answers, and is not tried out."""

    needs_real_pictures = True

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        raise RuntimeError("no answer")


def test_a_failing_reward_drops_its_groups_and_is_reported(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "eval.txt").write_text("a lake\na stone\n")
    assert train(["small.yaml", "--rewards", f"{__name__}:Flaky", "--eval-prompts", "eval.txt"]) == 0
    lines = untimed(workspace / "runs/run")
    dropped = sum(line["groups_dropped_count"] for line in lines)
    output = capsys.readouterr().out
    assert dropped == output.count("group dropped: ") > 0
    assert (
        "no answer" in output
        and "returned NaN for picture 1 of 4: return a finite number, or raise where there is none" in output
    )
    assert all(line["reward_mean"] is None or line["reward_mean"] > 0.1 for line in lines), (
        "a failure never counts as 0"
    )
    assert json.loads((workspace / "runs/run/summary.json").read_text())["groups_dropped_count"] == dropped


def test_what_was_not_learnt_from_is_told(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal rewards and lost groups are in the last lines, and large rewards leave the table whole."""
    (workspace / "eval.txt").write_text("a lake\na stone\na wall\na road\na field\n")
    assert train(["small.yaml", "--rewards", f"{__name__}:Constant", "--eval-prompts", "eval.txt"]) == 0
    lost = json.loads((workspace / "runs/run/summary.json").read_text())["groups_dropped_count"]
    output = capsys.readouterr().out
    assert "1e+06 ± 0.000" in output and "1000000" not in output
    equal, trained, look, _ = output.splitlines()[-4:]
    assert equal == "every group of 6 iterations had equal rewards: nothing was learnt from them"
    assert lost > 0 and trained.startswith("trained 6 iterations in ")
    assert trained.endswith(f"are in runs/run; {lost} of 18 groups were lost")
    assert look == "look: python -m dgpo_fast.evaluate --side-by-side runs/run"


class Varies:
    """Likes all pictures of a prompt alike but in the iterations, counted from 1, that `differs` holds."""

    differs: tuple[int, ...] = ()

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        done = Path("runs/run/metrics.jsonl")
        iteration = 1 + (len(read_metrics(done)) if done.exists() else 0)
        return np.arange(len(images)) if iteration in self.differs else np.zeros(len(images))


@pytest.mark.parametrize(("differs", "told_after"), [((), 3), ((2,), 5), ((3, 6), None), ((4,), 3)])
def test_equal_rewards_are_told_while_the_run_goes_on(
    differs: tuple[int, ...],
    told_after: int | None,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once, after three iterations in a row."""
    monkeypatch.setattr(Varies, "differs", differs)
    told: list[int] = []
    original = Trainer._log
    monkeypatch.setattr(
        Trainer,
        "_log",
        lambda self, metrics: told.append(capsys.readouterr().out.count(EQUAL)) or original(self, metrics),
    )
    assert train(["small.yaml", "--iterations", "7", "--rewards", f"{__name__}:Varies"]) == 0
    assert told == [int(number == told_after) for number in range(1, 8)]


def test_a_lost_reward_stops_the_run_with_a_checkpoint(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three iterations without one scored group the run ends in one line; nothing trained is lost."""
    from dgpo_fast.rewards.shipped import jpeg

    train(["small.yaml", "--iterations", "2"])
    monkeypatch.setattr(jpeg.JpegReward, "__call__", Broken.__call__)
    monkeypatch.setattr(jpeg.JpegReward, "self_test", lambda self: None)
    line = "^reward 'jpeg' scored nothing in 3 iterations in a row; the last failure: .*RuntimeError: no answer.*; fix "
    line += "the reward, then resume with: python -m dgpo_fast.train --resume runs/run$"
    with pytest.raises(UserError, match=line):
        train(["--resume", "runs/run", "--iterations", "9"])
    monkeypatch.undo()
    os.chdir(workspace)
    assert train(["--resume", "runs/run", "--iterations", "6"]) == 0
    assert [line["iteration"] for line in untimed(workspace / "runs/run")] == [1, 2, 3, 4, 5, 6]


def test_a_mended_reward_scores_the_model_as_it_came_again(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after are by the same reward: the same pictures as ever, scored by what `--resume` finds."""
    monkeypatch.syspath_prepend(str(workspace))
    module = workspace / "scale_rewards.py"
    module.write_text("def mean(images, prompts, metadata):\n    return images.mean((1, 2, 3)) / 255\n")
    assert train(["small.yaml", "--iterations", "1", "--rewards", "scale_rewards:mean"]) == 0
    run = workspace / "runs/run"
    first, kept = Evaluation.load(run / "evaluation_before.npz"), (run / "evaluation_before.npz").read_bytes()
    assert train(["--resume", "runs/run"]) == 0
    assert (run / "evaluation_before.npz").read_bytes() == kept and "scored again" not in capsys.readouterr().out
    module.write_text(module.read_text().replace("/ 255", "/ 2.55"))
    sys.modules.pop("scale_rewards")
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    line = (
        "runs/run/evaluation_before.npz: the content of scale_rewards:mean changed since it was written: the original "
        "model is scored again"
    )
    assert capsys.readouterr().out.splitlines().count(line) == 1
    again = Evaluation.load(run / "evaluation_before.npz")
    assert (again.images == first.images).all()
    np.testing.assert_allclose(again.rewards, first.rewards * 100, rtol=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["reward_mean"] == pytest.approx(100 * first.summary()["reward_mean"], rel=1e-5)
    assert summary["after"]["reward_mean"] == pytest.approx(summary["before"]["reward_mean"], rel=0.5)
    sys.modules.pop("scale_rewards")


def test_a_resumed_run_keeps_its_folder_where_its_mended_reward_fails(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before the first iteration: what was drawn once is there."""
    monkeypatch.setattr(Trainer, "anyone", lambda self, flag: True)
    assert train(["small.yaml"]) == 130
    monkeypatch.setattr(Broken, "fingerprint", "mended", raising=False)
    monkeypatch.setitem(BUILT_IN, "jpeg", f"{__name__}:Broken")
    with pytest.raises(UserError, match=r"no image of the evaluation .*; fix it and run the same command again$"):
        train(["--resume", "runs/run"])
    assert load_newest(workspace / "runs/run/checkpoints")[0].iteration == 0


class DiesAtTheEnd:
    """Scores until the run has its two iterations, and again once it is mended."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        metrics = Path("runs/run/metrics.jsonl")
        if metrics.exists() and len(read_metrics(metrics)) == 2 and not Path("mended").exists():
            raise RuntimeError("no answer")
        return images.mean((1, 2, 3)) / 255


@pytest.mark.parametrize(
    ("processes", "settings", "weights"),
    [
        (1, ["--policy.train", "lora"], "pytorch_lora_weights.safetensors"),
        (1, ["--policy.train", "full"], "transformer/diffusion_pytorch_model.safetensors"),
        (
            2,
            ["--policy.train", "full", "--distributed.shard", "full"],
            "transformer/diffusion_pytorch_model.safetensors",
        ),
    ],
    ids=["lora", "full", "sharded"],
)
def test_a_reward_that_dies_at_the_end_keeps_no_weights_back(
    processes: int, settings: list[str], weights: str, workspace: Path
) -> None:
    """The run ends in one line, but what it trained is saved; `--resume` adds the evaluation."""
    args = ["small.yaml", "--iterations", "2", "--rewards", f"{__name__}:DiesAtTheEnd", *settings]
    ends = finish(start(["-m", "dgpo_fast.train", *args], processes)) if processes > 1 else [run_quietly(args)]
    assert [status for status, _, _ in ends] == [2] * processes
    assert "no image of the evaluation could be scored; the first failure: reward" in ends[0][2]
    assert "; fix it, then resume with: python -m dgpo_fast.train --resume runs/run" in ends[0][2]
    run = workspace / "runs/run"
    trained = load_file(run / weights)
    assert not (run / "summary.json").exists()
    (workspace / "mended").touch()
    assert train(["--resume", "runs/run"]) == 0
    assert json.loads((run / "summary.json").read_text())["after"]["images"] == 12
    again = load_file(run / weights)
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)


def run_quietly(args: list[str]) -> tuple[int, str, str]:
    """Exit status, output (none) and error of a run in this process."""
    try:
        return train(args), "", ""
    except UserError as error:
        return 2, "", str(error)


class Dead:
    """As `Broken`, of the prompts that name it."""

    needs_real_pictures = True

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        raise RuntimeError("gone")


def test_a_dead_reward_beside_a_live_one_stops_the_run(workspace: Path) -> None:
    """Rewards are counted one by one: groups that another reward scored do not hide that this one never answers.

    Iterations in which no prompt asks for it count for nothing.
    """
    alive = [{"prompt": text, "reward": "jpeg"} for text in ("a cat", "a house", "a tree", "a river", "a boat")]
    prompts = [{"prompt": "a dog", "reward": "dead"}, *alive]
    (workspace / "mixed.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (workspace / "eval.jsonl").write_text('{"prompt": "a lake", "reward": "jpeg"}\n')
    args = ["small.yaml", "--prompts", "mixed.jsonl", "--eval-prompts", "eval.jsonl", "--iterations", "40"]
    with pytest.raises(UserError) as caught:
        train([*args, "--rewards", "jpeg", f"dead={__name__}:Dead", "--max-lost-iterations", "4"])
    start, place, end = str(caught.value).partition(f" ({__file__}, line ")
    assert place and start == (
        "reward 'dead' scored nothing in 4 iterations in a row; the last failure: reward 'dead', prompt 'a dog' "
        "(mixed.jsonl:1): RuntimeError: gone"
    )
    assert end.endswith("); fix the reward, then resume with: python -m dgpo_fast.train --resume runs/run")
    lines = untimed(workspace / "runs/run")
    assert [line["groups_dropped_count"] for line in lines].count(1) == 3, "the fourth ended the run"
    assert all(line["reward_mean"] is not None for line in lines)
    assert load_newest(workspace / "runs/run/checkpoints")[0].iteration == len(lines) > 3


def test_a_reward_that_never_works_leaves_no_folder(workspace: Path) -> None:
    line = r"^no image of the evaluation could be scored; .*no answer.*; fix it and run the same command again$"
    for _ in range(2):
        with pytest.raises(UserError, match=line):
            train(["small.yaml", "--rewards", f"{__name__}:Broken"])
        assert not (workspace / "runs" / "run").exists()


def first_alone(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
    """Scores the first picture alone, which passes for an evaluation's single ones."""
    return [images[0].mean() / 255]


def test_a_reward_is_tried_out_before_the_model_is_loaded(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgpo_fast.build.make_pipeline", Mock(side_effect=AssertionError))
    with pytest.raises(UserError) as caught:
        train(["small.yaml", "--rewards", f"{__name__}:first_alone"])
    assert str(caught.value).startswith(
        f"reward '{__name__}:first_alone', tried out on 4 coloured squares for prompt 'a cat' (prompts.txt:1): "
        "returned 1 score for 4 pictures: fix it"
    )
    assert not (workspace / "runs").exists()
