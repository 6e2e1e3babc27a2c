"""What a run hands on: weights that others load, a card that says what was measured, and the upload."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dgpo_fast import tiny
from dgpo_fast.config.command_line import run_command
from dgpo_fast.config.reading import resolve, write_yaml
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.models.families import BUILT_IN, find_class
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.lora import LORA_FILE
from dgpo_fast.publishing.command import export_command
from dgpo_fast.rollout.sampler import initial_noise
from dgpo_fast.rollout.schedule import make_scheduler
from dgpo_fast.seeds import stream_seed
from dgpo_fast.train import train
from tests.hub import TAKEN, TOKEN, Hub, running_hub
from tests.lora_readers import READERS

ROOT = Path(__file__).parents[1]
LAYER = "transformer_blocks.0.attn.to_q"


def scores(mean: float | None, half: float, prompts: int = 12) -> dict[str, Any]:
    ends = [None, None] if mean is None else [mean - half, mean + half]
    return {"reward_mean": mean, "reward_ci95": ends, "prompts": prompts, "images": 2 * prompts}


def make_run(folder: Path, settings: dict[str, Any] | None = None, layer: str = LAYER) -> Path:
    """A finished run of the shipped model, as `train` leaves one, with a LoRA of one layer."""
    folder.mkdir(parents=True)
    start = {"policy": {"train": "lora", "lora_rank": 2}, "seed": 7, "name": folder.name}
    config = resolve(resolve(get_recipe("tiny-shapes"), start, "a test"), settings or {}, "a test")
    write_yaml(config, folder / "config.yaml")
    generator = torch.Generator().manual_seed(0)
    factors = {"lora_A": (2, 128), "lora_B": (128, 2)}
    tensors = {f"transformer.{layer}.{n}.weight": torch.randn(s, generator=generator) for n, s in factors.items()}
    save_file(tensors, folder / LORA_FILE)
    tags = {"count": (scores(0.5, 0.02), scores(0.75, 0.03), scores(0.25, 0.01)), "a|b <i>": (scores(None, 0),) * 3}
    sides = {
        side: scores(mean, half) | {"tags": {tag: known[number] for tag, known in tags.items()}}
        for number, (side, mean, half) in enumerate(
            (("before", 0.552, 0.05), ("after", 0.711, 0.06), ("gain", 0.159, 0.066))
        )
    }
    for side in ("before", "after"):
        sides[side]["parts"] = {"shapes": 0.5, "shapes/correct": None}
    summary = {
        "iterations": 60,
        "training_images": 15360,
        "training_s": 301.4,
        "evaluated_on": "held-out prompts",
        **sides,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "before_after.png").write_bytes(b"a picture")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_run(Path("runs/shapes"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that this process and its children know, with a token."""
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        for name, value in {"HF_ENDPOINT": running.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_draws_the_run_s_last_pictures(reader: Any, workspace: Path, random_pipeline: Path) -> None:
    train(["small.yaml", "--iterations", "2"])
    export_command(["runs/run"])
    after, before = (Evaluation.load(Path("runs/run", f"evaluation_{when}.npz")) for when in ("after", "before"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(random_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("dpmpp_2m", 3.0)
    reader(pipeline, Path("exports/run"))
    pictures = pipeline(
        [prompt.text for prompt in after.prompts],
        latents=initial_noise((16, 8, 8), torch.arange(12), seed=stream_seed(0, "evaluation"), draw=0),
        num_inference_steps=4,
        guidance_scale=2.0,
        max_sequence_length=9,
        height=16,
        width=16,
        output_type="pt",
    ).images
    theirs = pictures.permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(theirs - after.images).max() <= 1.0
    assert np.abs(theirs - before.images).max() > 5.0, "the LoRA matters to these pictures"


def test_the_card_says_what_was_measured(run: Path) -> None:
    """It is read back by the hub's own classes; its Python loads the LoRA; nothing of this machine is in it."""
    export_command([str(run), "--base-model", "some/base", "--license", "apache-2.0"])
    card = ModelCard.load(Path("exports/shapes/README.md"))
    data = card.data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", "some/base", "diffusers")
    assert {"lora", "dgpo"} <= set(data.tags) and data.pipeline_tag == "text-to-image"
    (result,) = data.eval_results
    assert (result.metric_value, result.metric_name, result.dataset_name) == (0.711, "shapes", "held-out prompts")
    lines = card.text.splitlines()
    assert "| **all** | 0.552 ± 0.050 | 0.711 ± 0.060 | +0.159 ± 0.066 | 12 | 24 |" in lines
    assert "| count | 0.500 ± 0.020 | 0.750 ± 0.030 | +0.250 ± 0.010 | 12 | 24 |" in lines
    assert r"| a\|b \<i\> | – ± – | – ± – | – ± – | 12 | 24 |" in lines, "what stands in prompts is text"
    assert "| iterations | 60, each with 16 prompts × 16 images |" in lines and "| seed | 7 |" in lines
    assert (
        "![Before and after training](before_after.png)" in lines and Path("exports/shapes/before_after.png").is_file()
    )
    assert str(run.resolve().parents[1]) not in card.content and str(ROOT) not in card.content
    assert "[some/base](https://huggingface.co/some/base)" in card.text


def test_the_card_s_python_draws(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_command([str(run)])
    text = ModelCard.load(Path("exports/shapes/README.md")).text
    (code,) = (block.split("```")[0] for block in text.split("```python\n")[1:])
    monkeypatch.chdir("exports")
    found: dict[str, Any] = {}
    exec(code.replace("num_inference_steps=8", "num_inference_steps=2"), found)
    assert found["image"].size == (32, 32)
    assert found["pipe"].get_active_adapters(), "the LoRA is in it"


def test_a_merged_pipeline_and_a_fully_trained_one(run: Path) -> None:
    export_command([str(run), "--merged", "--output", "merged"])
    merged, base = (load_pipeline(p, revision=None, device=torch.device("cpu"), dtype=None) for p in ("merged", "tiny"))
    factors = load_file(run / LORA_FILE)
    a, b = (factors[f"transformer.{LAYER}.lora_{kind}.weight"] for kind in "AB")
    difference = merged.transformer.get_parameter(f"{LAYER}.weight") - base.transformer.get_parameter(f"{LAYER}.weight")
    torch.testing.assert_close(difference, b @ a, rtol=1e-4, atol=1e-4)
    full = make_run(Path("runs/full"), {"policy": {"train": "full"}})
    for path in tiny.PIPELINE_DIR.iterdir():
        (full / path.name).symlink_to(path)
    export_command([str(full)])
    kept = {path.name for path in Path("exports/full").iterdir()}
    assert kept == {"README.md", "summary.json", "before_after.png", "model_index.json"} | {
        path.name for path in tiny.PIPELINE_DIR.iterdir() if path.is_dir()
    }
    assert "pipe.load_lora_weights" not in Path("exports/full/README.md").read_text()
    loaded = load_pipeline("exports/full", revision=None, device=torch.device("cpu"), dtype=None)
    assert torch.equal(
        loaded.transformer.get_parameter(f"{LAYER}.weight"), base.transformer.get_parameter(f"{LAYER}.weight")
    )


def test_an_upload(run: Path, hub: Hub) -> None:
    """Through the hub's own setting of its address, in a process of its own: what is on the disk is on the hub."""
    done = subprocess.run(
        [sys.executable, "-m", "dgpo_fast.export", str(run), "--push", "me/shapes", "--private"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_bytes() for path in Path("exports/shapes").iterdir()}
    assert hub.models["me/shapes"] == files and set(files) > {LORA_FILE, "README.md", "summary.json"}
    assert hub.private == {"me/shapes"} and hub.cards[0]["license"] == "apache-2.0"
    assert f"uploaded: {hub.url}/me/shapes" in done.stdout
    assert "pipe.load_lora_weights('me/shapes')" in done.stdout.splitlines()[-1]
    assert "pipe.load_lora_weights('me/shapes')" in files["README.md"].decode()


def test_a_dry_run_asks_nothing_of_the_hub(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.refuses["/"] = "it was asked"
    export_command([str(run), "--push", "me/shapes", "--dry-run"])
    assert "pipe.load_lora_weights('me/shapes')" in ModelCard.load(Path("exports/shapes/README.md")).text
    assert list(hub.models) == [TAKEN]


def test_the_base_model_s_licence_is_that_of_its_card(run: Path, random_pipeline: Path, tmp_path: Path) -> None:
    """Its link is made whole; without a card it is unknown, and the card says so."""
    model = tmp_path / "my_sd3"
    model.mkdir()
    for path in random_pipeline.iterdir():
        (model / path.name).symlink_to(path)
    make_run(Path("runs/own"), {"model": str(model)})
    export_command(["runs/own", "--output", "unknown"])
    card = ModelCard.load(Path("unknown/README.md"))
    assert card.data.license is None and "is not known here" in card.text
    assert "'path/to/my_sd3'" in card.text and str(tmp_path) not in card.content
    licence = "license: other\nlicense_name: community\nlicense_link: LICENSE.md"
    (model / "README.md").write_text(f"---\n{licence}\n---\n")
    export_command(["runs/own", "--output", "known", "--base-model", "me/sd3"])
    card = ModelCard.load(Path("known/README.md"))
    assert (card.data.license, card.data.license_name) == ("other", "community")
    assert "[community](https://huggingface.co/me/sd3/blob/main/LICENSE.md)" in card.text


BAD = {
    "": "command line: give one run to export: dgpo-fast export runs/NAME",
    "runs/shapes runs/other": "command line: give one run to export",
    "runs/shape": "runs/shape: no run is there (it has no config.yaml): did you mean runs/shapes?",
    "runs/unfinished": f"runs/unfinished: the run has not finished, so it has no trained weights yet ({LORA_FILE}): "
    "resume it with `python -m dgpo_fast.train --resume runs/unfinished`",
    "runs/unmeasured": "runs/unmeasured: it has no summary.json, which the card is made of: make it with python -m",
    "runs/damaged": "runs/damaged/summary.json: is damaged: remove it, and make it again with python -m",
    "runs/random": "runs/random: its model had random weights (random_weights)",
    "runs/shapes --output taken": "taken exists: remove it, or choose another --output",
    "runs/shapes --output runs/shapes/config.yaml/x": "runs/shapes/config.yaml/x cannot be written: Not a directory",
    "runs/shapes --dry-run": "--dry-run: goes with --push account/name",
    "runs/shapes --private": "--private: goes with --push account/name",
    "runs/shapes --push shapes": "--push shapes: write account/name, with the account or organisation that ",
    "runs/shapes --push me/a/b": "--push me/a/b: is no name on the hub: ",
    "runs/shapes --base-model ./base": "--base-model ./base: is no name on the hub: ",
    "runs/shapes --name x": "command line: unknown setting 'name'",
    "runs/shapes --push me/taken": "--push me/taken: the hub has a model of that name already: choose another name",
    "HF_TOKEN= runs/shapes --push me/new": "--push me/new: no token: set HF_TOKEN to one that may write, or ",
    "HF_TOKEN=wrong runs/shapes --push me/new": "--push me/new: the hub does not accept the token: Invalid user token",
    "HF_ENDPOINT=http://127.0.0.1:9 runs/shapes --push me/new": "--push me/new: the hub does not accept the token: ",
}


@pytest.mark.parametrize("arguments", BAD)
def test_one_line_and_nothing_made(
    arguments: str, run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("unfinished", "unmeasured", "damaged", "random"):
        made = make_run(Path("runs", name), {"random_weights": name == "random"})
        if name in ("unfinished", "unmeasured"):
            (made / (LORA_FILE if name == "unfinished" else "summary.json")).unlink()
        if name == "damaged":
            (made / "summary.json").write_text('{"before": {"reward_mean": 1}}')
    Path("taken").mkdir()
    words = arguments.split()
    for name, value in (word.split("=", 1) for word in words if word.startswith("HF_")):
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", os.environ["HF_ENDPOINT"])
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["export", *(word for word in words if not word.startswith("HF_"))])
    assert run_command(export_command) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"error: {BAD[arguments]}"), errors
    assert sorted(Path().rglob("*")) == before


REFUSALS = {
    "/api/validate-yaml": "--push me/new: the hub refused to check the card: not today",
    "/api/repos/create": "--push me/new: the hub refused to make it; exports/shapes is complete: not today",
    "/api/models/me/new/preupload": "--push me/new: the upload ended early; `hf upload me/new exports/shapes` goes on",
    "/api/models/me/new/commit": "--push me/new: the upload ended early; `hf upload me/new exports/shapes` goes on",
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_an_upload_that_is_refused_is_one_line(refused: str, run: Path, hub: Hub) -> None:
    """The folder is complete by then, and stays."""
    hub.refuses[refused] = "not today"
    with pytest.raises(UserError) as caught:
        export_command([str(run), "--push", "me/new"])
    assert str(caught.value).startswith(REFUSALS[refused]) and "\n" not in str(caught.value)
    assert Path("exports/shapes", LORA_FILE).is_file()


def test_a_card_that_the_hub_does_not_accept(run: Path, hub: Hub) -> None:
    """The stand-in wants a licence. No model is made."""
    Path("my_model").symlink_to(tiny.PIPELINE_DIR)
    make_run(Path("runs/own"), {"model": "my_model"})
    with pytest.raises(UserError, match=r"^exports/own/README\.md: the hub does not accept the card: .*license is req"):
        export_command(["runs/own", "--push", "me/new"])
    assert list(hub.models) == [TAKEN]


def test_comfyui_is_named_as_the_documents_have_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which families' names it maps stands in docs/loras.md; a layer that a family does not adapt is named."""
    row = next(
        line for line in (ROOT / "docs/loras.md").read_text("utf-8").splitlines() if line.startswith("| ComfyUI, diff")
    )
    families = {find_class(kind, {"_class_name": kind}) for kind in BUILT_IN}
    mapped = {family.title for family in families if family.comfyui}
    assert mapped and all((family.title in row) == family.comfyui for family in families), mapped
    export_command([str(run), "--output", "usual"])
    assert f"ComfyUI: put {LORA_FILE} into models/loras" in capsys.readouterr().out
    make_run(Path("runs/other"), layer="transformer_blocks.1.ff.net.2")
    export_command(["runs/other"])
    assert "ComfyUI: 1 layer of 1, such as transformer_blocks.1.ff.net.2, may be skipped" in capsys.readouterr().out
