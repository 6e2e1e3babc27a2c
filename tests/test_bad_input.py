"""Every mistake a user can make at the start: one line on stderr, exit status 2, no folder made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgpo_fast.config.command_line import run_command
from dgpo_fast.run.search import runs_there
from dgpo_fast.train import train

MISTAKES = {
    # arguments: the line that they give
    "no-such-recipe": "error: unknown recipe 'no-such-recipe': `python -m dgpo_fast.recipes` lists",
    "my_recipe": "error: unknown recipe 'my_recipe': did you mean my_recipe.yaml?",
    "my_recipe.yml": "error: my_recipe.yml: no such file: did you mean my_recipe.yaml?",
    "other.yml": "error: other.yml: no such file: check the path (the working folder is CWD)",
    "--learning-rate 1": "error: command line: unknown setting 'learning_rate'",
    "--iterations many": "error: command line: iterations: input should be a valid integer",
    "--rollout.group-size 1": "error: command line: rollout.group_size: input should be greater than or equal to 2",
    "--prompts missing.txt": "error: missing.txt: no such prompt file",
    "--prompts empty.txt": "error: empty.txt: ",
    "--prompts latin1.txt": "error: latin1.txt:1: not UTF-8",
    "--prompts broken.jsonl": "error: broken.jsonl:2: ",
    "--prompts unquoted.txt --rewards ocr": "error: unquoted.txt:2: no text between double quotes in 'a sign'",
    "--prompts plain.txt --rewards shapes": "error: plain.txt:1: ",
    "--prompts sings": "error: no prompt source 'sings': did you mean 'signs'?",
    "--rewards shape": "error: no reward 'shape': did you mean 'shapes'?",
    "--model nowhere": "error: model 'nowhere': no such folder, and no name on the hub (organisation/name)",
    "--model empty": "error: model 'empty': no model_index.json there; give a pipeline's folder in diffusers' format",
    "--model flux": "error: model 'flux' is a WanPipeline, not a StableDiffusion3Pipeline, ",
    "--model broken": "error: broken/model_index.json: not a JSON object; the pipeline's folder is damaged",
    "--model hollow": "error: model 'hollow' lacks vae, which its model_index.json names: add the folder, or download ",
    "--policy.lora nan.safetensors": "error: command line: unknown setting 'policy.lora': did you mean 'lora'?",
    "--lora nowhere": "error: LoRA 'nowhere': no such file or folder",
    "--lora empty": "error: LoRA 'empty': no .safetensors file is there",
    "--lora plain.txt": "error: LoRA 'plain.txt': not a .safetensors file, which is the only kind that is read",
    "--lora other.safetensors": "error: LoRA 'other.safetensors' cannot be loaded into this model: it has no layer tra",
    "--lora dora.safetensors": "error: LoRA 'dora.safetensors' is of a DoRA (transformer_blocks.0.attn.to_q.dora_sca",
    "--lora nan.safetensors": "error: LoRA 'nan.safetensors' has numbers that are not finite, in ",
    "--lora nan.safetensors --policy.train full": "error: LoRA 'nan.safetensors' has numbers that are not finite, in ",
    "--resume hollow_run --lora nowhere": "error: --resume hollow_run: 'lora' cannot change within a run",
    "--device gpu": "error: --device gpu: no such device; use auto, cpu, cuda or cuda:N",
    "--device cuda:99": "error: --device cuda:99: this machine has ",
    "--rollout.shift 1e9": "error: command line: rollout.shift: input should be less than or equal to 100",
    "--optimizer.beta1 1": "error: command line: optimizer.beta1: input should be less than 1",
    "--rollout.guidance-scale inf": "error: command line: rollout.guidance_scale: input should be a finite number",
    "--policy.train lora --policy.lora-targets o_q": "error: policy.lora_targets: no linear layer of this transformer",
    "--runs-dir plain.txt": "error: CWD/plain.txt: no run's folder can be made there; choose another --runs-dir",
    "--rollout.resolution 36": "error: rollout.resolution 36: this model draws multiples of ",
    "--resume empty": "error: --resume empty: no run is there (it has no config.yaml)",
    "--resume nowhere": "error: --resume nowhere: no run is there (it has no config.yaml): there is runs/colour",
    "--resume runs/nothere": "error: --resume runs/nothere: no run is there (it has no config.yaml): there is runs/co",
    "--resume colour": "error: --resume colour: no run is there (it has no config.yaml): did you mean runs/colour?",
    "--resume runs/colours": "error: --resume runs/colours: no run is there (it has no config.yaml): did you mean",
    "my.yaml --resume hollow_run": "error: --resume takes its settings from the run: leave 'my.yaml' out",
    "--resume hollow_run my.yaml": "error: --resume takes its settings from the run: leave 'my.yaml' out",
    "--name ../w": "error: --name ../w: is a path: leave out '/', '\\' and '..'; --runs-dir says where runs go",
    "--name a/b": "error: --name a/b: is a path: ",
    "--name a\\b": "error: --name a\\b: is a path: ",
    "--resume hollow_run": "error: hollow_run/checkpoints: no valid checkpoint to resume from",
    "--watch.every 0 --watch.rules stop": "error: command line: watch.rules is given but watch.every is 0, so that ",
    "--watch.every 0 --watch.rewards jpeg": "error: command line: watch.rewards is given but watch.every is 0, so th",
    "--watch.rewards shapes": "error: watch.rewards shapes: it is trained on; name a reward that is not",
    "--watch.rewards shape": "error: no reward 'shape': did you mean 'shapes'?",
    "--watch.grid 1": "error: command line: watch.grid: input should be greater than 1",
    "--watch.edges 1": "error: command line: watch.edges: input should be less than 1",
    "--watch.images-per-prompt 1": "error: command line: watch.images_per_prompt: input should be greater than or eq",
    "--advantage.of each --advantage.std off": "error: command line: advantage.of is each but advantage.std is off: ",
    "--regulariser.norm-hinge -1": "error: command line: regulariser.norm_hinge: input should be greater than or eq",
    "--regulariser.kl-growth -1": "error: command line: regulariser.kl_growth: input should be greater than or equal",
    "--regulariser.kl-growth 9 --dgpo.kl-weight 0": "error: regulariser.kl_growth 9: objective 'dgpo' has no KL term ",
    "--objective ram --rewards shapes jpeg --regulariser.kl-gate jpeg": "error: regulariser.kl_gate jpeg: objective 'r",
    "--regulariser.kl-gate jpeg": "error: regulariser.kl_gate jpeg: no such reward in this run, which has shapes: add ",
    "--regulariser.kl-gate shapes": "error: regulariser.kl_gate shapes: nothing else is trained on, and a reward alw",
    "--name taken": "error: runs/taken exists: choose another --name, or continue it with --resume runs/taken",
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "flux", "broken", "hollow", "hollow_run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "my_recipe.yaml").write_text("iterations: 3\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin1.txt").write_bytes("a café\n".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": \n')
    (tmp_path / "unquoted.txt").write_text('a sign that says "open"\na sign\n')
    (tmp_path / "plain.txt").write_text("a cat\n")
    layer = "transformer_blocks.0.attn.to_q"
    save_file({f"{layer.replace('0', '99')}.lora_A.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    save_file({f"{layer}.dora_scale": torch.ones(2)}, tmp_path / "dora.safetensors")
    save_file({f"{layer}.lora_A.weight": torch.full((2, 128), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (tmp_path / "broken" / "model_index.json").write_text("{")
    (tmp_path / "hollow" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]})
    )
    (tmp_path / "hollow_run" / "config.yaml").write_text("recipe: tiny-shapes\n")
    (tmp_path / "runs" / "colour").mkdir(parents=True)
    (tmp_path / "runs" / "colour" / "config.yaml").write_text("recipe: tiny-shapes\n")
    return tmp_path


@pytest.mark.parametrize("arguments", MISTAKES)
def test_one_line_and_nothing_made(
    arguments: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if "taken" in arguments:
        (workspace / "runs" / "taken").mkdir(parents=True)
    before = sorted(workspace.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train", *arguments.split()])
    assert run_command(train) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith(MISTAKES[arguments].replace("CWD", str(workspace)))
    assert sorted(workspace.rglob("*")) == before


def test_an_error_names_the_newest_runs_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate("abcdefg"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
        os.utime(tmp_path / "runs" / name / "config.yaml", (1e9 - age, 1e9 - age))
    assert runs_there("runs/nothere") == ": there are runs/a, runs/b, runs/c, runs/d, runs/e and 2 more"
    assert runs_there("elsewhere/nothere") == ""


def test_exit_status_of_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dgpo_fast.train", "tiny-shape"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown recipe 'tiny-shape': did you mean 'tiny-shapes'?\n"
