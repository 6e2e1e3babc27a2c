"""What runs, folders of groups and evaluations depend on: what is refused if it has changed, and what is said."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import flat
from dgpo_fast.config.resuming import LEARNS, MAY_CHANGE, MUST_STAY, NOTHING, ROUNDS, effect, listed
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.drawer import _digest_of_tensors
from dgpo_fast.models import prompt_cache
from dgpo_fast.models.fingerprints import sampled_fingerprint, weights_fingerprint
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.prompts import load_prompts
from dgpo_fast.prompts.prompt import digest
from dgpo_fast.run.depends import change, changed, told_changes
from dgpo_fast.train import train
from tests.evaluation.cases import DRAWING
from tests.runs import untimed


def dark(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """Likes dark pictures."""
    return -images.mean((1, 2, 3))


def test_changes_are_named_together() -> None:
    before = {"a": "1", "rewards": ["jpeg", "shapes"], "rollout.shift": 3.0, "prompts": "x", "kept": "old"}
    now = {"a": "1", "rewards": ("shapes", "jpeg"), "rollout.shift": 5.0, "prompts": "y", "kept": "new", "added": "z"}
    names = changed(before, now, {"kept": "old"})
    assert names == ["rollout.shift", "prompts"], "the order of a list does not count, and earlier versions' values do"
    assert change("here", names, "it was made", "make it again") == (
        "here: rollout.shift and the training prompts changed since it was made: make it again"
    )


def test_what_makes_prompts_others(tmp_path: Path) -> None:
    """Text and metadata do, also those that only a reward reads; how a file spells the same lines does not."""

    def digests(content: str, name: str = "p.jsonl") -> tuple[str, str]:
        (tmp_path / name).write_bytes(content.encode())
        sets = load_prompts(str(tmp_path / name))
        return digest(sets.train), digest(sets.held_out)

    lines = [f'{{"prompt": "cat {number}", "tag": "a", "count": {number}}}' for number in range(10)]
    first = digests("\n".join(lines))
    assert digests("\ufeff" + "\r\n\r\n".join(lines) + "\r\n") == first
    assert digests("\n".join(line.replace('"tag": "a", ', "").replace("}", ', "tag": "a"}') for line in lines)) == first
    for changed_lines in (
        [line.replace('"count": 3', '"count": 4') for line in lines],
        [line.replace("cat 3", "dog 3") for line in lines],
        lines[:-1],
        [*lines, lines[0]],
    ):
        assert digests("\n".join(changed_lines)) != first
    table = digests("prompt,tag,count\ncat,a,1\ndog,a,2\n", "p.csv")
    assert digests("count;Category;Prompts\n1;a;cat\n2;a;dog\n", "p.csv") == table


def test_what_a_resumed_run_may_change() -> None:
    """Every name is a setting or a group of them; all others must stay."""
    settings = flat(Config())
    groups = {name.partition(".")[0] + "." for name in settings if "." in name}
    assert all(name in settings or name in groups for name in (*MAY_CHANGE, *MUST_STAY))
    assert effect("engine.rollout_precision") == effect("optimizer.lr") == LEARNS
    assert effect("engine.compile") == ROUNDS and effect("log.wandb") == effect("prompt_cache_gib") == NOTHING
    assert effect("optimizer.name") is effect("seed") is effect("evaluation.images") is effect("rewards") is None
    assert listed(LEARNS) == "`iterations`, `optimizer.*` but `optimizer.name`, `engine.rollout_precision`"


def test_what_is_said_of_another_start() -> None:
    now = {
        "code": "b",
        "processes": 2,
        "dtype": "float32",
        "engine": {"device": "cpu", "attention": "native", "train_attention": "matmul"},
        "config": {"iterations": 9, "seed": 0, "optimizer": {"lr": 0.1, "name": "adamw"}, "log": {"wandb": None}},
    }
    assert told_changes({}, now) == told_changes(now, now) == [], "earlier versions have kept less"
    before = {
        "code": "a",
        "processes": 1,
        "dtype": "bfloat16",
        "engine": {"device": "H200", "attention": "native", "train_attention": "native"},
        "config": {"iterations": 3, "optimizer": {"lr": 0.2, "name": "adamw"}, "log": {"wandb": "x"}},
    }
    assert told_changes(before, now) == [
        "the code (a → b)",
        "the number of processes (1 → 2)",
        "the precision (bfloat16 → float32)",
        "the device (H200 → cpu)",
        "the engine's train attention (native → matmul)",
        "optimizer.lr (0.2 → 0.1)",
    ]


def test_a_resumed_run_says_what_is_not_the_same(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, and nothing if all is the same. What cannot change is refused with what can."""
    assert train(["small.yaml", "--iterations", "1"]) == 0
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    assert "changed since" not in capsys.readouterr().out
    assert train(["--resume", "runs/run", "--iterations", "3", "--optimizer.lr", "0.01"]) == 0
    told = "changed since the checkpoint was written: optimizer.lr (0.03 → 0.01): results may differ\n"
    assert told in capsys.readouterr().out
    with pytest.raises(UserError) as caught:
        train(["--resume", "runs/run", "--seed", "3"])
    assert str(caught.value) == (
        "--resume runs/run: 'seed' cannot change within a run: start a new run for that; what can change is "
        + listed().replace("`", "")
    )


@pytest.fixture
def model(random_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the random pipeline, to be changed, whose files are old enough to be remembered."""
    folder = Path(shutil.copytree(random_pipeline, tmp_path / "model"))
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return folder


def fingerprint(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    pipeline = load_pipeline(str(folder), revision=None, device=torch.device("cpu"), dtype=dtype, with_text=False)
    return weights_fingerprint(pipeline)


def change_one_number(file: Path) -> None:
    """In the middle of the largest tensor, where no sample of elements looks."""
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[tensors[name].numel() // 2 + 1] += 0.5
    save_file(tensors, file, {"format": "pt"})


def test_one_number_of_a_model_is_enough(model: Path) -> None:
    """Of what draws and of what reads prompts. Other files beside the weights, and the precision, do not count."""
    first = fingerprint(model)
    (model / "README.md").write_text("a model\n")
    (model / "transformer/notes.txt").write_text("trained by me\n")
    shutil.copy(
        model / "vae/diffusion_pytorch_model.safetensors", model / "vae/diffusion_pytorch_model.fp16.safetensors"
    )
    assert fingerprint(model) == fingerprint(model, torch.bfloat16) == first
    seen = [first]
    for part in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder_2/model"):
        change_one_number(model / f"{part}.safetensors")
        seen.append(fingerprint(model))
    (model / "tokenizer/merges.txt").write_text("#version: 0.2\na b\n")
    assert len({*seen, fingerprint(model)}) == 5


def test_a_second_start_reads_no_weights_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(model)
    read: list[str] = []
    original = prompt_cache.hashlib.file_digest

    def file_digest(file, *more):  # type: ignore[no-untyped-def]
        read.append(Path(file.name).relative_to(model).as_posix())
        return original(file, *more)

    monkeypatch.setattr(prompt_cache.hashlib, "file_digest", file_digest)
    assert fingerprint(model) == first and not read
    change_one_number(model / "vae/diffusion_pytorch_model.safetensors")
    assert fingerprint(model) != first and read == ["vae/diffusion_pytorch_model.safetensors"]


def test_what_earlier_versions_have_written_goes_on(workspace: Path, model: Path) -> None:
    """Runs, folders of groups and evaluations, with the fingerprints that were kept before; no other ones."""
    args = ["small.yaml", "--model", "model", "--iterations", "1"]
    offline = ["--data.source", "offline", "--data.offline-groups", "3", "--rewards", "jpeg", f"{__name__}:dark=0.5"]
    assert train([*args, *offline]) == 0
    pipeline = load_pipeline("model", revision=None, device=torch.device("cpu"), dtype=torch.float32, with_text=False)
    old = {"manifest": sampled_fingerprint(pipeline), "groups": sampled_fingerprint(pipeline, with_text=True)}
    groups = workspace / "runs/run/groups/groups.json"
    kept = json.loads(groups.read_text())
    kept["conditions"] |= {"model": old["groups"], "rewards": kept["conditions"]["rewards"][::-1]}
    groups.write_text(json.dumps(kept))
    (checkpoint,) = sorted((workspace / "runs/run/checkpoints").iterdir())[-1:]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["info"]["depends"].keys() == {"training prompts", "evaluation prompts", "model's weights"}
    manifest["info"]["depends"]["model's weights"] = old["manifest"]
    for name in ("dtype", "engine"):
        del manifest["info"][name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    assert len(untimed(workspace / "runs/run")) == 2

    drawing = ["model", *DRAWING, "--rewards", "jpeg", "--output", "out"]
    assert evaluate(drawing) == 0
    made_with = yaml.safe_load((workspace / "out/evaluation.yaml").read_text())
    made_with["weights_sha256"] = _digest_of_tensors(pipeline.transformer)
    (workspace / "out/evaluation.yaml").write_text(yaml.safe_dump(made_with))
    assert evaluate(drawing) == 0
    assert json.loads((workspace / "out/results.json").read_text())["drawn_count"] == 0

    change_one_number(model / "transformer/diffusion_pytorch_model.safetensors")
    file = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    save_file(
        {name: 1.1 * tensor for name, tensor in file.items()},
        model / "transformer/diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    for command, arguments, line in (
        (train, ["--resume", "runs/run", "--iterations", "3"], "--resume runs/run: the model's weights changed since"),
        (evaluate, drawing, "out: the model's weights changed since it was made: choose another --output"),
        (
            train,
            [*args, *offline, "--name", "other", "--data.folder", "runs/run/groups"],
            "runs/run/groups: the model's weights changed since its groups were drawn: name another --data.folder",
        ),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(line)}"):
            command(arguments)
