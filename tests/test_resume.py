"""Runs that are stopped, killed, resumed or ended early: the same run, and nothing lost."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from dgpo_fast.config.reading import read_yaml
from dgpo_fast.errors import UserError
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.run.start import resumed_config
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.processes import PythonProcess
from tests.runs import command, untimed
from tests.servers import wait_for


@pytest.mark.parametrize("extra", [[], ["--policy.train", "full", "--optimizer.lr", "1e-3"]], ids=["lora", "full"])
def test_resuming_from_any_checkpoint_gives_the_undisturbed_run(workspace: Path, extra: list[str]) -> None:
    """Metrics and final weights equal those of the run that was never stopped, whichever checkpoint is the last."""
    train(["small.yaml", *extra])
    run = workspace / "runs" / "run"
    for last in (1, 3, 5):
        copy = workspace / "runs" / f"from{last}"
        shutil.copytree(run, copy)
        for path in (copy / "checkpoints").iterdir():
            if int(path.name[-6:]) > last:
                shutil.rmtree(path)
        assert train(["--resume", str(copy)]) == 0
        assert untimed(copy) == untimed(run)
        ours, theirs = load_newest(copy / "checkpoints")[0], load_newest(run / "checkpoints")[0]
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
        assert (copy / "summary.json").exists()


def test_sigkill_and_resume(workspace: Path) -> None:
    """A process killed without warning goes on from its newest whole checkpoint as if nothing had been."""
    process = PythonProcess(["-m", "dgpo_fast.train", "small.yaml", "--name", "killed", "--iterations", "4000"])
    checkpoints = workspace / "runs/killed/checkpoints"
    wait_for(lambda: len(list(checkpoints.glob("iteration-*"))) > 3)
    process.kill()
    assert not (workspace / "runs/killed/summary.json").exists(), "the run was killed before its end"
    iterations = str(load_newest(checkpoints)[0].iteration + 2)
    assert train(["--resume", "runs/killed", "--iterations", iterations]) == 0
    train(["small.yaml", "--name", "undisturbed", "--iterations", iterations])
    assert untimed(workspace / "runs/killed") == untimed(workspace / "runs/undisturbed")


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(workspace: Path) -> None:
    process = PythonProcess(["-m", "dgpo_fast.train", "small.yaml", "--iterations", "4000"])
    wait_for(lambda: (workspace / "runs/run/checkpoints/iteration-000003").exists())
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in output + errors
    assert output.splitlines()[-1].endswith("resume with: python -m dgpo_fast.train --resume runs/run")
    done = len(untimed(workspace / "runs/run"))
    assert (workspace / f"runs/run/checkpoints/iteration-{done:06d}").exists(), "the finished step was saved"
    assert train(["--resume", "runs/run", "--iterations", str(done + 1)]) == 0
    assert len(untimed(workspace / "runs/run")) == done + 1


def test_a_run_of_before_a_setting_keeps_its_gradient(workspace: Path) -> None:
    """A config.yaml without the settings of the gradient is of a run that began before there were any: it goes on with
    the gradient that it had, though its recipe has the release's by now."""
    train(["sd35m-cfgfree", "--config", "small.yaml", "--rollout.resolution", "16", "--iterations", "1"])
    settings = read_yaml(workspace / "runs/run/config.yaml")
    assert settings["dgpo"].pop("guided_reference") and settings["dgpo"].pop("training_sigma") == "timestep"
    settings["flow_grpo"].pop("unconditional_gradient")
    (workspace / "runs/run/config.yaml").write_text(yaml.safe_dump(settings))
    resumed = resumed_config(workspace / "runs/run", ["--iterations", "2"])
    assert (resumed.dgpo.guided_reference, resumed.dgpo.training_sigma) == (False, "grid")
    assert resumed.flow_grpo.unconditional_gradient
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0


@pytest.mark.parametrize("change", ["--rewards jpeg=2", "--policy.lora-alpha 80", "--evaluation.images 4", "--seed 7"])
def test_a_resumed_run_stays_the_same_experiment(change: str, workspace: Path) -> None:
    train(["small.yaml", "--iterations", "1"])
    name = change.split()[0].removeprefix("--").replace("-", "_")
    with pytest.raises(UserError, match=f"--resume runs/run: '{name}' cannot change within a run"):
        train(["--resume", "runs/run", *change.split()])
    assert train(["--resume", "runs/run", "--iterations", "2", "--optimizer.lr", "1e-3"]) == 0


def test_a_resume_that_trains_nothing_leaves_the_record_alone(workspace: Path) -> None:
    """Settings that no iteration would use are refused; results that are missing are still made, with any of them."""
    train(["small.yaml", "--iterations", "3"])
    run = workspace / "runs/run"
    record, summary = (run / "config.yaml").read_bytes(), (run / "summary.json").read_bytes()
    for change, line in {
        "--optimizer.lr 1e-4": "runs/run: all 3 iterations are done: give a larger --iterations to train further",
        "--iterations 2": "runs/run has done 3 iterations already: give --iterations 3 or more",
    }.items():
        with pytest.raises(UserError, match=f"^{line}$"):
            train(["--resume", "runs/run", *change.split()])
    (run / "summary.json").unlink()
    assert train(["--resume", "runs/run", "--reward-deadline-s", "99"]) == 0
    assert ((run / "summary.json").read_bytes(), (run / "config.yaml").read_bytes()) == (summary, record)
    assert train(["--resume", "runs/run", "--iterations", "4", "--optimizer.lr", "1e-4"]) == 0
    assert read_yaml(run / "config.yaml")["optimizer"]["lr"] == 1e-4


def test_a_run_can_be_ended_where_it_is(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many iterations as are done: the run gets its results, and stays the longer run that it was."""
    monkeypatch.setattr(Trainer, "anyone", lambda self, flag: self.iteration >= 2)
    assert train(["small.yaml"]) == 130
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    run = workspace / "runs/run"
    assert json.loads((run / "summary.json").read_text())["iterations"] == 2
    assert read_yaml(run / "config.yaml")["iterations"] == 6


def test_an_unforeseen_error_loses_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a step raises, the steps before it are in a checkpoint."""
    original, calls = Trainer.step, []

    def step(self: Trainer) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("a bug")
        original(self)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(RuntimeError, match="a bug"):
        train(["small.yaml", "--checkpoint.every", "100"])
    monkeypatch.undo()
    os.chdir(workspace)
    assert load_newest(workspace / "runs/run/checkpoints")[0].iteration == 3
    assert train(["--resume", "runs/run"]) == 0
    assert [line["iteration"] for line in untimed(workspace / "runs/run")] == [1, 2, 3, 4, 5, 6]


def test_a_broken_checkpoint_is_passed_over(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(["small.yaml"])
    newest = workspace / "runs/run/checkpoints/iteration-000006/state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert train(["--resume", "runs/run"]) == 0
    output = capsys.readouterr().out
    assert "passed over runs/run/checkpoints/iteration-000006: state.safetensors does not match its checksum" in output
    assert "resuming after iteration 5" in output


def test_full_disk_keeps_the_last_good_checkpoint(workspace: Path) -> None:
    """On a file system with room for some checkpoints only, the run ends in one line and resumes elsewhere."""
    disk = workspace / "disk"
    disk.mkdir()
    keep_all = ["--checkpoint.keep", "99", "--iterations", "60", "--runs-dir", str(disk), "--name", "run"]
    inside = " ".join([*command("small.yaml", *keep_all), f"2>{workspace}/errors; echo $? >{workspace}/status"])
    script = f"mount -t tmpfs -o size=2m tmpfs {disk} && {{ {inside}; cp -r {disk}/run {workspace}/rescued; }}"
    subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], check=True, stdout=subprocess.DEVNULL)
    errors = (workspace / "errors").read_text().splitlines()
    assert (workspace / "status").read_text() == "2\n"
    assert len(errors) == 1 and "No space left on device" in errors[0], errors
    assert "the last good checkpoint is" in errors[0]
    state, passed_over = load_newest(workspace / "rescued" / "checkpoints")
    assert not passed_over and 0 < state.iteration < 60
    assert not list((workspace / "rescued" / "checkpoints").glob(".*")), "nothing half-written is left"
    assert train(["--resume", str(workspace / "rescued"), "--iterations", str(state.iteration + 1)]) == 0
