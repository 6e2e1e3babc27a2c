"""Whole runs with every objective: killed and resumed, on data drawn once, and with an objective of a user's own."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dgpo_fast.errors import UserError
from dgpo_fast.learning.learner import Learner
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.train import train
from tests.processes import PythonProcess
from tests.runs import untimed
from tests.servers import wait_for

ROOT = Path(__file__).parents[1]
NOISE = ["--rollout.solver=euler", "--rollout.noise-level=0.7"]
OFFLINE = ["--data.source=offline", "--data.offline-groups=8"]
SYSTEMS = {
    "dgpo-sde": NOISE,
    "dgpo-merged": ["--policy.forward=merged", "--precision=bf16"],
    "dgpo-offline": OFFLINE,
    "dgpo-held": [
        *("--rewards=jpeg", "pixels=0", "--regulariser.kl-gate=pixels", "--regulariser.kl-growth=100"),
        *("--dgpo.kl-weight=1", "--advantage.keep=2"),
    ],
    "diffusion-dpo": ["--objective=diffusion_dpo", "--optimizer.lr=1e-3"],
    "flow-grpo-window": [
        "--objective=flow_grpo",
        "--optimizer.lr=1e-3",
        "--ema.switch-ema-ref=none",
        *NOISE,
        "--rollout.noise-kind=cps",
        "--rollout.noise-steps=2",
        "--flow-grpo.ratio=squared",
        "--flow-grpo.steps=1",
        "--advantage.keep=2",
        "--advantage.keep-by=draw",
    ],
    "nft": ["--objective=nft", "--optimizer.lr=1e-3", "--ema.switch-ema-ref=0", "--nft.optimizer-steps=2"],
    "awm": ["--objective=awm", "--optimizer.lr=1e-3", "--ema.switch-ema-ref=none", "--awm.timesteps=2"],
    "ram": ["--objective=ram", "--optimizer.lr=1e-3", "--ema.switch-ema-ref=0", "--ram.timesteps=2"],
    "crd": [
        "--objective=crd",
        "--optimizer.lr=1e-3",
        "--ema.switch-ema-ref=none",
        "--ema.rollout-decay-per-step=0.1",
        "--ema.rollout-decay-delay=3",
    ],
    "flow-grpo": ["--objective=flow_grpo", "--optimizer.lr=1e-3", "--ema.switch-ema-ref=none", *NOISE],
}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_newest(folder / "checkpoints")[0].tensors


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(system: str, workspace: Path) -> None:
    """SIGKILL in mid-run, then --resume: metrics and weights are those of the run that was left alone."""
    args = ["small.yaml", *SYSTEMS[system], "--iterations", "6"]
    killed = PythonProcess(["-m", "dgpo_fast.train", *args, "--name", "killed"])
    assert train([*args, "--name", "undisturbed"]) == 0
    wait_for((workspace / "runs/killed/checkpoints/iteration-000002").exists)
    killed.kill()
    shutil.rmtree(workspace / "runs/killed/checkpoints/iteration-000006", ignore_errors=True)
    assert train(["--resume", "runs/killed"]) == 0
    ours, theirs = workspace / "runs/killed", workspace / "runs/undisturbed"
    assert untimed(ours) == untimed(theirs)
    assert all(torch.equal(tensor, state(theirs)[name]) for name, tensor in state(ours).items())


def test_flow_grpo_takes_several_optimizer_steps(workspace: Path) -> None:
    """The step that both optimizer steps share is on policy at first only; one step an iteration stays on policy."""
    args = ["small.yaml", *SYSTEMS["flow-grpo"], "--iterations", "2", "--flow-grpo.clip-range", "1e9"]
    for steps in ("1", "2"):
        assert train([*args, "--name", steps, "--flow-grpo.optimizer-steps", steps]) == 0
    one, two = (untimed(workspace / "runs" / steps) for steps in ("1", "2"))
    assert all(line["ratio_deviation"] < 1e-6 for line in one)
    assert all(line["ratio_deviation"] > 1e-5 for line in two)
    optimizer_steps = [next(v for k, v in state(workspace / "runs" / s).items() if k.endswith("/step")) for s in "12"]
    assert [float(step) for step in optimizer_steps] == [2.0, 4.0]


def test_an_iteration_broken_between_its_optimizer_steps_is_done_again(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step was taken, the second failed: no checkpoint holds half an iteration, and resuming repeats it."""
    args = ["small.yaml", *SYSTEMS["flow-grpo"], "--iterations", "3"]
    train([*args, "--name", "undisturbed"])
    original, calls = Learner._update, []

    def update(self: Learner, *args: Any) -> tuple[torch.Tensor, bool]:
        calls.append(1)
        if len(calls) == 4:
            raise UserError("the second step of the second iteration")
        return original(self, *args)

    monkeypatch.setattr(Learner, "_update", update)
    with pytest.raises(UserError, match="the second step"):
        train([*args, "--name", "broken"])
    monkeypatch.undo()
    os.chdir(workspace)
    assert load_newest(workspace / "runs/broken/checkpoints")[0].iteration == 1
    assert train(["--resume", "runs/broken"]) == 0
    assert untimed(workspace / "runs/broken") == untimed(workspace / "runs/undisturbed")


def test_offline_groups_serve_other_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn once, as the online run's first iterations draw them, and read by a run with another seed and objective."""
    train(["small.yaml", *OFFLINE, "--name", "first", "--data.folder", "groups"])
    train(["small.yaml", "--name", "online", "--iterations", "2", "--policy.micro-batch", "5"])
    files = sorted(Path("groups").glob("*.safetensors"))
    assert [read_x0(file).shape[0] for file in files] == [12, 12, 8]
    before = {path: path.stat().st_mtime_ns for path in Path("groups").iterdir()}
    monkeypatch.setattr("dgpo_fast.rollout.online.RolloutWorker.draw_groups", None)
    reuse = ["small.yaml", *OFFLINE, "--data.folder", "groups", "--seed", "5", "--objective", "diffusion_dpo"]
    assert train([*reuse, "--name", "second"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("groups").iterdir()} == before
    first, second, online = (untimed(workspace / "runs" / name) for name in ("first", "second", "online"))
    assert len({line["reward_mean"] for line in second}) > 1, "iterations go through different groups"
    assert [line["reward_mean"] for line in first] != [line["reward_mean"] for line in second]
    with safe_open(files[0], framework="pt") as file:
        drawn = float(file.get_tensor("rewards").double().mean())
    assert drawn == pytest.approx(online[0]["reward_mean"], rel=1e-6), "the reference is the policy of iteration 0"
    summary = json.loads((workspace / "runs/second/summary.json").read_text())
    assert summary["source"] == "offline" and summary["drawn_images"] == 32 and summary["drawing_s"] > 0


def read_x0(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("x0")


def test_offline_groups_of_something_else_are_refused(workspace: Path, random_pipeline: Path) -> None:
    """Before the run has a folder, in one line that names what differs; damage is named too."""
    offline = ["small.yaml", *OFFLINE, "--data.folder", "groups", "--iterations", "1"]
    train([*offline, "--name", "first"])
    (workspace / "other.txt").write_text("a lake\na stone\na road\na hat\na bee\na cup\n")
    shutil.copytree(random_pipeline, "other_model")
    weights = Path("other_model/vae/diffusion_pytorch_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0x40
    weights.write_bytes(content)
    different = {
        "--rollout.group-size=5": "rollout.group_size",
        "--rollout.guidance-scale=3": "rollout.guidance_scale",
        "--rewards=jpeg=2": "the rewards",
        "--prompts=other.txt": "the training prompts",
        "--model=other_model": "the model's weights",
        "--data.offline-groups=9": "data.offline_groups",
    }
    for change, name in different.items():
        with pytest.raises(UserError, match=f"^groups: {name} changed since its groups were drawn: name another"):
            train([*offline, "--name", "second", change])
    assert not Path("runs/second").exists()
    damaged = Path("groups/groups-000001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"^groups/groups-000001.safetensors: damaged \(.*\): remove it and"):
        train([*offline, "--name", "third"])
    damaged.unlink()
    assert train(["--resume", "runs/third"]) == 0
    assert untimed(workspace / "runs/third") == untimed(workspace / "runs/first"), "drawn again as it was"


class Waits:
    """Brightness; once a file of groups is there, it waits for as long as there is a file `wait`."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        while Path("wait").exists() and list(Path("runs/killed/groups").glob("g*.safetensors")):
            time.sleep(0.1)
        return images.mean((1, 2, 3))


def test_a_drawing_that_is_killed_goes_on(workspace: Path) -> None:
    """SIGKILL while groups are drawn: what is there stays, and the rest is what one go would have drawn."""
    args = ["small.yaml", *OFFLINE, "--iterations=2", f"--rewards={__name__}:Waits"]
    train([*args, "--name", "undisturbed"])
    Path("wait").touch()
    process = PythonProcess(["-m", "dgpo_fast.train", *args, "--name", "killed"])
    wait_for(lambda: list(Path("runs/killed/groups").glob("g*.safetensors")))
    process.kill()
    Path("wait").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in Path("runs/killed/groups").glob("g*.safetensors")}
    assert len(kept) == 1, "it was killed before the next file"
    assert train(["--resume", "runs/killed"]) == 0
    for name, modified in kept.items():
        assert (Path("runs/killed/groups") / name).stat().st_mtime_ns == modified
    for path in Path("runs/undisturbed/groups").glob("g*.safetensors"):
        assert torch.equal(read_x0(path), read_x0(Path("runs/killed/groups") / path.name))
    assert untimed(workspace / "runs/killed") == untimed(workspace / "runs/undisturbed")


def test_groups_that_another_reward_of_the_same_name_scored_are_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module with other code gives another scores: they are not mixed, and one line says what to do."""
    monkeypatch.syspath_prepend(str(workspace))
    module = workspace / "own_scores.py"
    module.write_text("def mean(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    args = ["small.yaml", *OFFLINE, "--data.folder=groups", "--iterations=1", "--rewards", "own_scores:mean"]
    assert train([*args, "--name", "first"]) == 0
    assert train([*args, "--name", "second"]) == 0
    module.write_text(module.read_text().replace("mean((", "max(("))
    with pytest.raises(UserError) as caught:
        train([*args, "--name", "third"])
    sys.modules.pop("own_scores")
    assert str(caught.value) == (
        "groups: the content of own_scores:mean changed since its groups were drawn: name another --data.folder, or "
        "remove this one to have them drawn anew"
    )


class Away:
    """Brightness; does not answer the calls whose numbers are in `away`. It is not tried out, which would be a call."""

    needs_real_pictures = True

    calls = 0
    away = range(0)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        call, Away.calls = Away.calls, Away.calls + 1
        if call in Away.away:
            raise RuntimeError("no answer")
        return images.mean((1, 2, 3))


def test_a_judge_that_comes_back_costs_a_drawing_no_group(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away for one file, it is asked for that one again; away for three in a row, the run stops and `--resume` draws
    what is missing. Either way the groups are those of an undisturbed drawing."""
    args = ["small.yaml", *OFFLINE, "--iterations", "1", "--rewards", f"{__name__}:Away"]
    evaluation, file = 12, 3  # calls before the drawing, and for each of its files

    def drawn(name: str, away: range) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(Away, "calls", 0)
        monkeypatch.setattr(Away, "away", away)
        train([*args, "--name", name])
        return contents(name)

    def contents(name: str) -> dict[str, torch.Tensor]:
        files = sorted(Path(f"runs/{name}/groups").glob("*.safetensors"))
        return {f"{path.name} {key}": value for path in files for key, value in load_file(path).items()}

    def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
        return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)

    undisturbed = drawn("undisturbed", range(0))
    assert len(undisturbed) == 3 * 3
    second = evaluation + file
    assert same(drawn("briefly", range(second, second + file)), undisturbed)
    with pytest.raises(UserError) as caught:
        drawn("stopped", range(second, 1000))
    assert str(caught.value).startswith("runs/stopped/groups: no group of 3 files in a row could be scored; ")
    assert "; fix the reward and --resume. The last failure: reward " in str(caught.value)
    (kept,) = Path("runs/stopped/groups").glob("*.safetensors")
    written = kept.stat().st_mtime_ns
    monkeypatch.setattr(Away, "away", range(0))
    assert train(["--resume", "runs/stopped"]) == 0
    assert kept.stat().st_mtime_ns == written
    assert same(contents("stopped"), undisturbed)
