"""What a stranger may hand over (settings, prompts, a checkpoint, a run's folder) executes nothing, and is refused in
one line. Checkpoints themselves: `test_checkpoint.py`."""

import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.prompts.files import read_prompts

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(f'*{old}' for _ in range(9))}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("!!python/object/apply:os.system ['touch executed']", "not valid YAML"),
        ("model: !!python/object/apply:os.system ['touch executed']", "not valid YAML"),
        ("!!python/module:antigravity {}", "not valid YAML"),
        (BOMB, "aliases"),
        ("[" * 50_000, "nested too deeply"),
        ("model: " + "x" * 2_000_000, "larger than"),
        ("model: \x00", "not valid YAML"),
        ("__class__: evil", "unknown setting '__class__'"),
        ("rollout:\n  __init__: 1", "unknown setting 'rollout.__init__'"),
        ("recipe: ../../etc/passwd", "unknown recipe"),
    ],
)
def test_malicious_settings(content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(content)
    started = time.monotonic()
    with pytest.raises(UserError, match=reason) as error:
        configure(["evil.yaml"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not Path("executed").exists() and time.monotonic() - started < 30


HOSTILE = {
    "100MB line": b"x" * 100_000_000,
    "pickle": pickle.dumps({"prompt": "a cat"}),
    "binary": b"\x00\xff\xfe" * 100,
    "deep JSON": b'{"prompt": ' * 5_000,
}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("prompts.txt", "100MB line"),
        ("prompts.txt", "pickle"),
        ("prompts.txt", "binary"),
        *(("prompts.jsonl", what) for what in HOSTILE),
    ],
)
def test_malicious_prompts(name: str, what: str, tmp_path: Path) -> None:
    """Refused in one line."""
    (tmp_path / name).write_bytes(HOSTILE[what])
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_hundred_megabyte_line_is_not_read_into_memory(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"x" * 100_000_000)
    script = (
        "import resource, sys; from pathlib import Path; from dgpo_fast.prompts.files import read_prompts\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_prompts(Path(sys.argv[1]))\n"
        "except Exception as error: print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, 'kilobytes'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "prompts.txt")], capture_output=True, text=True, check=True
    )
    assert "line longer than 100000 bytes" in done.stdout


class Payload:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("what", ["model index", "weights", "lora"])
def test_malicious_model(what: str, tmp_path: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline whose files are pickles, or that names code of its own, is refused and runs nothing."""
    import torch

    from dgpo_fast.models.loading import load_pipeline

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(random_pipeline, folder)
    if what == "model index":
        index = (folder / "model_index.json").read_text()
        (folder / "model_index.json").write_text(index.replace('"diffusers",\n    "SD3Tr', '"evil",\n    "SD3Tr'))
        (folder / "transformer/evil.py").write_text("open('executed', 'w')")
        assert '"evil"' in (folder / "model_index.json").read_text()
    if what == "weights":
        (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
        torch.save({"w": Payload()}, folder / "transformer/diffusion_pytorch_model.bin")
    load = {"model": str(folder), "revision": None, "device": torch.device("cpu"), "dtype": torch.float32}
    if what == "lora":
        pipeline = load_pipeline(**load)
        (tmp_path / "lora").mkdir()
        torch.save({"w": Payload()}, tmp_path / "lora/pytorch_lora_weights.bin")
        with pytest.raises(Exception, match=r"safetensors|pickle|weights_only"):
            pipeline.load_lora_weights(tmp_path / "lora", use_safetensors=True)
    else:
        with pytest.raises(UserError) as error:
            load_pipeline(**load)
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_a_run_folder_of_a_stranger_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--resume` of a folder whose settings, checkpoint and earlier evaluation are pickles."""
    from dgpo_fast.evaluation.held_out import Evaluation
    from dgpo_fast.train import train

    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run/checkpoints/iteration-000001"
    checkpoint.mkdir(parents=True)
    for path in (
        checkpoint / "state.safetensors",
        checkpoint / "manifest.json",
        tmp_path / "run/evaluation_before.npz",
    ):
        path.write_bytes(pickle.dumps(Payload()))
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"recipe": "tiny-shapes"}))
    with pytest.raises(UserError, match="no valid checkpoint to resume from"):
        train(["--resume", "run"])
    with pytest.raises(ValueError, match="pickle"):
        Evaluation.load(tmp_path / "run/evaluation_before.npz")
    assert not Path("executed").exists()
