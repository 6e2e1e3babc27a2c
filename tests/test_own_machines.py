"""What people's own settings files, terminals, job managers and loggers do to a run."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure, run_command
from dgpo_fast.config.options import Log
from dgpo_fast.config.reading import read_yaml
from dgpo_fast.errors import UserError
from dgpo_fast.run.checkpoint import CheckpointWriter, load_newest
from dgpo_fast.run.metrics import WANDB_ID, Loggers
from dgpo_fast.run.stop_signal import SIGNALS
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "Off", "y", "2026-11-29"])
def test_words_of_yaml_are_read_as_written(word: str, tmp_path: Path) -> None:
    """Not as the booleans and dates of YAML 1.1: `compile: off` is what the help says."""
    (tmp_path / "s.yaml").write_text(f"a: {word}\nb: [{word}, true, False]\n")
    assert read_yaml(tmp_path / "s.yaml") == {"a": word, "b": [word, True, False]}


def test_settings_that_are_off_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("prompt_cache: off\nengine: {compile: off, overlap: no}\nlog: {wandb: off, tensorboard: yes}\n")
    config = configure([str(path)])
    assert (config.prompt_cache, config.engine.compile, config.engine.overlap) == ("off", "off", False)
    assert (config.log.wandb, config.log.tensorboard) == (None, True)
    assert configure(["--log.wandb", "off"]).log.wandb is None


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text(
        "model: ~/m\nprompts: ~/p.txt\neval_prompts: ~/e.txt\nruns_dir: ~/r\ndata: {folder: ~/g}\n"
    )
    config = configure(["--config=~/s.yaml"])
    paths = (config.model, config.prompts, config.eval_prompts, config.runs_dir, config.data.folder)
    assert paths == tuple(str(tmp_path / name) for name in ("m", "p.txt", "e.txt", "r", "g"))
    with pytest.raises(UserError, match=f"^--resume {tmp_path}/none: no run is there"):
        train(["--resume", "~/none"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--rollout.height 512", "unknown setting 'rollout.height': resolution takes HEIGHTxWIDTH, as in 512x768"),
        ("--rewards pickscore:1.0", "reward 'pickscore:1.0': a weight is written pickscore=1.0"),
    ],
)
def test_a_hint_names_what_there_is_for_the_purpose(arguments: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        config = configure(arguments.split())
        build(config)
    assert line in str(caught.value) and "did you mean" not in str(caught.value)


def test_a_terminal_without_some_letters() -> None:
    """The error has an ellipsis; the terminal has ASCII alone."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dgpo_fast.train", "--prompts", "größe…"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: no prompt source ") and b"Traceback" not in done.stderr


STOPPED = """
import os, signal, sys
from dgpo_fast.run.stop_signal import StopSignal
stop = StopSignal()
with stop.installed():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print("requested" if stop.requested else "ignored", flush=True)
"""


@pytest.mark.parametrize("name", [name for name in SIGNALS if hasattr(signal, name)])
@pytest.mark.parametrize("ignored", [False, True], ids=["heard", "ignored before"])
def test_signals_that_ask_a_run_to_stop(name: str, ignored: bool) -> None:
    """As `nohup` has it, one that is ignored when the process starts stays so."""

    def ignore() -> None:
        signal.signal(getattr(signal, name), signal.SIG_IGN if ignored else signal.SIG_DFL)

    done = subprocess.run(
        [sys.executable, "-c", STOPPED, name], capture_output=True, text=True, preexec_fn=ignore, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "ignored\n" if ignored else "requested\n"), done.stderr


class Recorded:
    """W&B, as far as a run uses it: it writes when it is finished, as the real one may."""

    def __init__(self) -> None:
        self.started: list[dict] = []
        self.held: list[int] = []
        self.written: list[list[int]] = []

    def init(self, **settings: object) -> types.SimpleNamespace:
        self.started.append(settings)
        number = settings["id"] or f"id{len(self.started)}"
        return types.SimpleNamespace(
            id=number, log=lambda metrics, step: self.held.append(step), finish=lambda: self.written.append(self.held)
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=recorded.init))
    return recorded


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt, UserError])
def test_loggers_are_closed_however_a_run_ends(
    ending: type[BaseException] | None, workspace: Path, wandb: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.step

    def step(self: Trainer) -> dict:
        if ending is not None and self.iteration == 2:
            raise ending("over")
        return original(self)

    monkeypatch.setattr(Trainer, "step", step)
    arguments = ["small.yaml", "--iterations", "3", "--log.wandb", "project"]
    if ending is None:
        assert train(arguments) == 0
    else:
        with pytest.raises(ending):
            train(arguments)
    assert wandb.written == [[1, 2, 3] if ending is None else [1, 2]]


def test_a_resumed_run_logs_to_the_same_place(workspace: Path, wandb: Recorded) -> None:
    settings = ["--log.wandb", "project", "--optimizer.lr-decay", "none"]
    assert train(["small.yaml", "--iterations", "1", *settings]) == 0
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    assert [(one["id"], one["resume"]) for one in wandb.started] == [(None, None), ("id1", "allow")]


@pytest.mark.parametrize("number", ["EIO", "ESTALE", "ENOTCONN", "EDQUOT", "EROFS"])
def test_a_file_system_that_fails_is_one_line(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Disks that break, NFS servers that are started again, FUSE mounts whose server has ended."""
    code = getattr(errno, number)

    def command(args: list[str]) -> int:
        raise OSError(code, os.strerror(code), "runs/a/metrics.jsonl")

    assert run_command(command) == 2
    assert capsys.readouterr().err == f"error: runs/a/metrics.jsonl cannot be written: {os.strerror(code)}\n"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SMB, some FUSE, Windows: the checkpoint is written. A file that cannot be synced is an error."""
    original = os.fsync
    refused = {"folders": True, "files": False}

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if refused["folders" if is_folder else "files"]:
            raise OSError(number, os.strerror(number))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, {})
    writer.save(1, {"policy": {"w": torch.ones(2)}})
    writer.wait()
    assert load_newest(tmp_path / "checkpoints")[0].iteration == 1
    refused["files"] = True
    writer.save(2, {"policy": {"w": torch.ones(2)}})
    with pytest.raises(UserError, match=r"could not be saved \("):
        writer.wait()


@pytest.mark.parametrize("more", [[], ["--ema.offload"], ["--policy.train", "full"], ["--ema.eval-decay-max", "0.1"]])
def test_what_is_saved_has_the_last_iteration_in_it(more: list[str], workspace: Path) -> None:
    """Whatever `ema.eval_every`; the average that goes on is not touched."""
    trainer = Trainer(build(configure(["small.yaml", "--ema.eval-every", "2", *more])))
    trainer.open_logs(workspace, {})
    trainer.console.start_training(0, 3)
    for _ in range(2):
        trainer.step()
    kept = {name: weight.clone() for name, weight in trainer.learner.slow.weights.items()}
    assert trainer.learner.evaluated_weights() is trainer.learner.slow.weights
    trainer.step()
    saved = trainer.learner.evaluated_weights()
    trainer.close()
    for name, weight in trainer.models.weights.items():
        assert torch.equal(trainer.learner.slow.weights[name], kept[name])
        decay = min(4 / 13, trainer.config.ema.eval_decay_max)
        expected = kept[name] + (1 - decay) * (weight.detach().float() - kept[name])
        torch.testing.assert_close(saved[name], expected)
        assert not torch.equal(saved[name], kept[name]) or torch.equal(weight.detach().float(), kept[name])


def test_tensorboard_forgets_what_a_resumed_run_does_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was logged after the checkpoint; and it is closed at the end."""
    opened: list[dict] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            opened.append({"purge_step": purge_step, "steps": set(), "closed": False})

        def add_scalar(self, name: str, value: float, step: int) -> None:
            opened[-1]["steps"].add(step)

        def flush(self) -> None: ...

        def close(self) -> None:
            opened[-1]["closed"] = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert train(["small.yaml", "--iterations", "3", "--log.tensorboard"]) == 0
    shutil.rmtree(workspace / "runs/run/checkpoints/iteration-000003")
    assert train(["--resume", "runs/run"]) == 0
    assert opened == [
        {"purge_step": None, "steps": {1, 2, 3}, "closed": True},
        {"purge_step": 3, "steps": {3}, "closed": True},
    ]


@pytest.mark.parametrize("content", ["", "\n", "id9"])
def test_a_kept_name_of_a_wandb_run(content: str, tmp_path: Path, wandb: Recorded) -> None:
    """One that a full disk has left empty starts a new W&B run."""
    (tmp_path / WANDB_ID).write_text(content)
    Loggers(Log(wandb="project"), tmp_path, {}, print).close()
    (started,) = wandb.started
    assert (started["id"], started["resume"]) == (("id9", "allow") if content == "id9" else (None, None))


@pytest.mark.parametrize("what", ["training prompts", "evaluation prompts", "model's weights", None])
def test_a_run_whose_ground_has_changed_is_not_resumed(
    what: str | None, workspace: Path, random_pipeline: Path
) -> None:
    """Before and after would be of different things. The order and the blank lines of a file change nothing."""
    shutil.copytree(random_pipeline, workspace / "model")
    (workspace / "held_out.txt").write_text("a fox\na hat\n")
    settings = [
        "--model",
        "model",
        "--eval-prompts",
        "held_out.txt",
        "--iterations",
        "1",
        "--optimizer.lr-decay",
        "none",
    ]
    assert train(["small.yaml", *settings]) == 0
    if what == "training prompts":
        (workspace / "prompts.txt").write_text("a cat\na cow\n")
    elif what == "evaluation prompts":
        (workspace / "held_out.txt").write_text("a fox\na coat\n")
    elif what is None:
        (workspace / "held_out.txt").write_text("\na hat\r\na fox")
    else:
        file = workspace / "model/transformer/diffusion_pytorch_model.safetensors"
        save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    resume = ["--resume", "runs/run", "--iterations", "2"]
    if what is None:
        assert train(resume) == 0
        return
    with pytest.raises(UserError) as caught:
        train(resume)
    assert str(caught.value) == (
        f"--resume runs/run: the {what} changed since the run began: put back what it was, or start a new run"
    )
