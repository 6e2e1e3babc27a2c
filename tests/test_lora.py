"""Runs that start from a LoRA, and what they save."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from dgpo_fast import tiny
from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.folder import EvaluationFolder
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.models.loading import how_to_load, load_pipeline
from dgpo_fast.models.lora import LORA_FILE, find_lora, merge_lora
from dgpo_fast.models.merge import merge_command
from dgpo_fast.train import train
from tests.lora_readers import READERS

START = {
    # layer: rank and alpha; the first is one that runs train too
    "transformer_blocks.0.attn.to_q": (3, 6.0),
    "transformer_blocks.1.ff.net.2": (5, 2.0),
}
DRAWN = ["--prompts", "held_out.txt", "--images", "none", "--rewards", "jpeg", "--device", "cpu"]
DRAWN += ["--num-inference-steps", "4", "--guidance-scale", "2", "--max-sequence-length", "9", "--batch-size", "6"]
DRAWN += ["--resolution", "none"]


def loaded(folder: Path) -> StableDiffusion3Pipeline:
    return load_pipeline(str(folder), revision=None, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def start(workspace: Path, random_pipeline: Path) -> str:
    """A LoRA with alphas as tensors, of ranks of its own."""
    transformer, generator = loaded(random_pipeline).transformer, torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (rank, alpha) in START.items():
        rows, columns = transformer.get_parameter(f"{layer}.weight").shape
        tensors[f"transformer.{layer}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * 0.3
        tensors[f"transformer.{layer}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
        tensors[f"transformer.{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, workspace / "start.safetensors")
    return "start.safetensors"


def drawn(run: str, when: str) -> np.ndarray:
    return Evaluation.load(Path("runs", run, f"evaluation_{when}.npz")).images.astype(int)


def evaluated(*args: str, run: str, output: str) -> np.ndarray:
    """The pictures of an evaluation on a run's held-out prompts, from the same noise."""
    prompts = [prompt.text for prompt in Evaluation.load(Path("runs", run, "evaluation_after.npz")).prompts]
    Path("held_out.txt").write_text("".join(f"{text}\n" for text in prompts))
    assert evaluate([*args, *DRAWN, "--output", output]) == 0
    folder = EvaluationFolder(Path(output))
    return np.stack([folder.read_image(row) for row in folder.rows()]).astype(int)


def distance(some: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(some - others).max())


@pytest.mark.parametrize("how", [[], ["--policy.behaviour", "adapter"], ["--low-memory"]], ids=" ".join)
def test_a_run_starts_from_a_lora_and_saves_one_over_the_model(
    how: list[str], start: str, random_pipeline: Path
) -> None:
    """Before is the model with the LoRA. The saved one, over the model as it was, draws what the run drew last."""
    assert train(["small.yaml", "--lora", start, "--iterations", "2", "--name", "a", *how]) == 0
    before = evaluated(str(random_pipeline), "--lora", start, run="a", output="before")
    after = evaluated(str(random_pipeline), "--lora", "runs/a", run="a", output="after")
    plain = evaluated(str(random_pipeline), run="a", output="plain")
    assert distance(before, drawn("a", "before")) <= 1 and distance(after, drawn("a", "after")) <= 1
    assert distance(before, after) > 5 and distance(before, plain) > 5, "the start and the training matter"
    saved = load_file(f"runs/a/{LORA_FILE}")
    assert {tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in saved.items()} == {3 + 4}, "one rank"


def test_a_chain_of_runs(start: str, workspace: Path, random_pipeline: Path) -> None:
    """Each run starts where the last one ended; the last LoRA has them all in it. Run and evaluations agree."""
    for source, name in ((start, "a"), ("runs/a", "b"), ("runs/b", "c")):
        train(["small.yaml", "--lora", source, "--iterations", "2", "--name", name])
    assert distance(drawn("b", "before"), drawn("a", "after")) <= 1
    assert distance(drawn("c", "before"), drawn("b", "after")) <= 1
    after = evaluated(str(random_pipeline), "--lora", "runs/c", run="c", output="after")
    assert distance(after, drawn("c", "after")) <= 1
    assert evaluate(["--side-by-side", "runs/c"]) == 0
    for folder, when in (("c-before", "before"), ("c", "after")):
        found = EvaluationFolder(workspace / "evaluations" / folder)
        pictures = np.stack([found.read_image(row) for row in found.rows()]).astype(int)
        assert distance(pictures, drawn("c", when)) <= 1
    assert distance(drawn("c", "before"), drawn("c", "after")) > 5


def test_all_weights_can_be_trained_from_a_lora(start: str) -> None:
    """The pipeline that is saved has it in it."""
    train(["small.yaml", "--lora", start, "--policy.train", "full", "--optimizer.lr", "1e-3", "--iterations", "2"])
    assert distance(evaluated("runs/run", run="run", output="after"), drawn("run", "after")) <= 1
    before = evaluated("runs/run", "--weights", "before", run="run", output="before")
    assert distance(before, drawn("run", "before")) <= 1 and distance(before, drawn("run", "after")) > 5
    with pytest.raises(UserError, match=r"^LoRA 'runs/run': a whole pipeline is there, no LoRA: use it as the model"):
        train(["small.yaml", "--lora", "runs/run", "--name", "next"])


@pytest.mark.parametrize("reader", READERS)
def test_every_loader_reads_the_joined_lora_alike(reader: Callable, start: str, random_pipeline: Path) -> None:
    """Ranks 3, 4 and 5 are in it, each with another alpha."""
    parts = build(configure(["small.yaml", "--lora", start]))
    models, generator = parts.models, torch.Generator().manual_seed(1)
    weights = {name: torch.randn(weight.shape, generator=generator) * 0.3 for name, weight in models.weights.items()}
    models.save(weights, Path("saved"), parts.pipeline)
    models.load_behaviour(weights)
    drew, original, pipeline = models.behaviour.state_dict(), loaded(random_pipeline), loaded(random_pipeline)
    reader(pipeline, Path("saved"))
    changed = set()
    for name, weight in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(weight, drew[name], rtol=1e-5, atol=1e-5)
        if not torch.allclose(weight, original.transformer.state_dict()[name], atol=1e-2):
            changed.add(name.removesuffix(".weight"))
    trained = {name.split(".lora_")[0] for name in models.weights}
    assert changed == {*START, *trained} and len(START.keys() - trained) == 1


def test_a_run_is_resumed_with_the_lora_that_it_began_with(start: str, workspace: Path) -> None:
    train(["small.yaml", "--lora", start, "--iterations", "2", "--name", "a"])
    train(["small.yaml", "--lora", start, "--iterations", "1", "--name", "b"])
    train(["small.yaml", "--iterations", "1", "--name", "without"])
    for run, lora in (("b", "runs/a"), ("b", "none"), ("without", start)):
        with pytest.raises(UserError, match=f"^--resume runs/{run}: 'lora' cannot change within a run"):
            train(["--resume", f"runs/{run}", "--lora", lora, "--iterations", "2"])
    assert train(["--resume", "runs/b", "--lora", start, "--iterations", "2"]) == 0
    saved = [load_file(f"runs/{name}/{LORA_FILE}") for name in "ab"]
    assert all(tensor.equal(saved[1][name]) for name, tensor in saved[0].items())
    assert train(["--resume", "runs/b", "--iterations", "3", "--precision", "bf16"]) == 0
    tensors = load_file(start)
    tensors[f"transformer.{next(iter(START))}.alpha"] *= 1.001
    save_file(tensors, start)
    line = "^--resume runs/b: the starting LoRA's weights changed since the run began: put back what it was, or start"
    with pytest.raises(UserError, match=line):
        train(["--resume", "runs/b", "--iterations", "4"])
    with pytest.raises(
        UserError, match=r"^runs/b: the starting LoRA's weights changed since the run began: put back what sta"
    ):
        evaluate(["runs/b", "--weights", "before"])
    assert evaluate(["runs/b"]) == 0, "the trained weights do not depend on it"


def test_a_lora_for_text_encoders_is_merged_first(workspace: Path, random_pipeline: Path) -> None:
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(32, 2)}, "t.safetensors"
    )
    with pytest.raises(
        UserError, match=r"^LoRA 't.safetensors' changes text encoders too, .*dgpo-fast merge MODEL t\."
    ):
        train(["small.yaml", "--lora", "t.safetensors"])
    assert not Path("runs").exists()


def test_an_unfinished_run_has_no_lora_yet(workspace: Path) -> None:
    Path("runs/a/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^LoRA 'runs/a': the run has not finished, so it has no LoRA yet: resume it"):
        find_lora(Path("runs/a"))


def test_in_bf16_the_start_is_merged_as_an_evaluation_merges_it(start: str, random_pipeline: Path) -> None:
    """In fp32, rounded once: the run's base to the last bit."""
    config = configure(["small.yaml", "--lora", start, "--precision", "bf16"])
    base = build(replace(config)).models.base
    pipeline = load_pipeline(str(random_pipeline), revision=None, device=torch.device("cpu"), dtype=torch.bfloat16)
    merge_lora(pipeline, Path(start))
    expected = pipeline.transformer.state_dict()
    assert all(weight.equal(expected[name]) for name, weight in base.state_dict().items())


def test_a_model_with_a_lora_merged_keeps_its_dtypes(start: str, model_of_three_dtypes: Path) -> None:
    """In fp32 and rounded once; what the LoRA does not touch is bit for bit the model's."""
    tensors = load_file(start)
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {f"{layer}.lora_down.weight": torch.randn(2, 16), f"{layer}.lora_up.weight": torch.randn(32, 2)}
    save_file(tensors, "both.safetensors")
    merge_command([str(model_of_three_dtypes), "both.safetensors", "out/merged"])
    changed = []
    for part, name in PARTS.items():
        before, after = load_file(model_of_three_dtypes / part / name), load_file(Path("out/merged") / part / name)
        assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
        changed += [f"{part}/{name}" for name, tensor in before.items() if not tensor.equal(after[name])]
    assert changed == [
        "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight",
        *(f"transformer/{layer}.weight" for layer in START),
    ]
    found = load_file(f"out/merged/transformer/{PARTS['transformer']}")
    original = load_file(model_of_three_dtypes / "transformer" / PARTS["transformer"])
    for name, (rank, alpha) in START.items():
        product = tensors[f"transformer.{name}.lora_up.weight"] @ tensors[f"transformer.{name}.lora_down.weight"]
        by_hand = original[f"{name}.weight"].float() + alpha / rank * product
        torch.testing.assert_close(found[f"{name}.weight"], by_hand.bfloat16(), rtol=2**-7, atol=0)
    assert [path.name for path in Path("out").iterdir()] == ["merged"]


PARTS = {
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def model_of_three_dtypes(workspace: Path, random_pipeline: Path) -> Path:
    """As people's models are: a transformer in bf16, a first text encoder in fp16, the rest in fp32."""
    pipeline = loaded(random_pipeline)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.text_encoder.to(torch.float16)
    pipeline.save_pretrained(workspace / "model")
    return workspace / "model"


BAD_MERGES = {
    # arguments: the line that they give
    "": "command line: give a model, a LoRA and the folder to write: dgpo-fast merge MODEL LORA FOLDER",
    "tiny start.safetensors": "command line: give a model, a LoRA and the folder to write",
    "tiny start.safetensors out more": "command line: give a model, a LoRA and the folder to write",
    "tiny start.safetensors out --dtype bf16": "command line: unknown setting 'dtype'",
    "tiny start.safetensors taken": "taken exists: choose another folder",
    "tiny nowhere out": "LoRA 'nowhere': no such file or folder",
    "tiny start.safetensors out": "LoRA 'start.safetensors' cannot be loaded into this model: ",
    "nowhere start.safetensors out": "model 'nowhere': no such folder",
    "tiny start.safetensors small.yaml/out": "small.yaml/out cannot be written: Not a directory",
}


@pytest.mark.parametrize("arguments", BAD_MERGES)
def test_a_merge_that_fails_leaves_nothing(arguments: str, start: str, workspace: Path) -> None:
    Path("taken").mkdir()
    before = sorted(workspace.iterdir())
    with pytest.raises(UserError) as caught:
        merge_command(arguments.split())
    assert str(caught.value).startswith(BAD_MERGES[arguments]) and "\n" not in str(caught.value)
    assert sorted(workspace.iterdir()) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_merge_that_is_broken_off_leaves_nothing(
    error: BaseException, start: str, workspace: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(pipeline: StableDiffusion3Pipeline, folder: Path, **kwargs: object) -> None:
        (folder / "transformer").mkdir()
        raise error

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_pretrained", save)
    before = sorted(workspace.iterdir())
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        merge_command([str(random_pipeline), start, "out"])
    assert isinstance(error, KeyboardInterrupt) or str(caught.value) == "out cannot be written: No space left on device"
    assert sorted(workspace.iterdir()) == before


FRESH = """
import sys
import torch
from safetensors.torch import save_file

for number, line in enumerate(sys.argv[1:]):
    exec(line)
    if "load_lora" in line:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    noise = torch.Generator().manual_seed(0)
    pictures = pipe("a red circle", num_inference_steps=2, max_sequence_length=0, generator=noise, output_type="pt")
    save_file({"picture": pictures.images.contiguous(), **pipe.transformer.state_dict()}, f"{number}.safetensors")
assert not any(name.startswith(("dgpo_fast", "dgpo_kernels")) for name in sys.modules)
"""


def test_the_lines_that_are_printed_load_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process that never imports this package: the shipped model, which has no T5, trained, with a LoRA, and with
    that merged."""
    monkeypatch.chdir(tmp_path)
    sizes = "--rollout.groups 2 --rollout.group-size 2 --rollout.num-inference-steps 2 --dgpo.timesteps 1"
    short = [
        "--iterations",
        "1",
        *sizes.split(),
        "--evaluation.images",
        "4",
        "--evaluation.num-inference-steps",
        "2",
        "--device",
        "cpu",
    ]
    train([*short, "--name", "full", "--policy.train", "full"])
    train([*short, "--name", "lora", "--policy.train", "lora", "--policy.lora-rank", "4"])
    merge_command(["tiny", "runs/lora", "it's merged"])
    output = capsys.readouterr().out.splitlines()
    lines = [line.removeprefix("load: ") for line in output if line.startswith("load: ")]
    assert len(lines) == 3 and output[-1].startswith("load: ")
    done = subprocess.run([sys.executable, "-c", FRESH, *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged = loaded(tiny.PIPELINE_DIR)
    merge_lora(merged, find_lora(Path("runs/lora")))
    for number, ours in enumerate((loaded(Path("runs/full")), merged, merged)):
        theirs = load_file(f"{number}.safetensors")
        for name, weight in ours.transformer.state_dict().items():
            torch.testing.assert_close(theirs[name], weight, rtol=1e-5, atol=1e-6)
    drew, again = load_file("1.safetensors")["picture"], load_file("2.safetensors")["picture"]
    assert (drew - again).abs().max() * 255 <= 1


def test_an_index_without_a_word_of_t5(tmp_path: Path, random_pipeline: Path) -> None:
    """As an index of null is: the line that loads it says what is not there."""
    pipeline = loaded(random_pipeline)
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    pipeline.register_to_config(text_encoder_3=(None, None), tokenizer_3=(None, None))
    pipeline.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/model_index.json"
    index = json.loads(path.read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        assert index.pop(part) == [None, None]
    path.write_text(json.dumps(index))
    assert loaded(tmp_path / "model").text_encoder_3 is None
    line = how_to_load(tmp_path / "model")
    assert line.endswith("model', text_encoder_3=None, tokenizer_3=None)")
    found: dict = {}
    exec(line, found)
    assert found["pipe"].text_encoder_3 is None


@pytest.mark.parametrize(
    ("model", "revision", "ending"),
    [
        ("organisation/sd3", "v2", "('organisation/sd3', revision='v2', variant='fp16')"),
        ("organisation/sd3", None, "('organisation/sd3', variant='fp16')"),
        (None, None, "/model', variant='fp16')"),
    ],
)
def test_a_line_names_what_the_hub_and_the_files_need(
    model: str | None, revision: str | None, ending: str, tmp_path: Path, random_pipeline: Path
) -> None:
    """Weights in the fp16 variant alone are not found without its name."""
    loaded(random_pipeline).save_pretrained(tmp_path / "model", variant="fp16")
    assert how_to_load(tmp_path / "model", model, revision).endswith(ending)
    found: dict = {}
    exec(how_to_load(tmp_path / "model"), found)
    assert found["pipe"].transformer is not None
