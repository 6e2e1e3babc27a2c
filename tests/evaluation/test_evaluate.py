"""`python -m dgpo_fast.evaluate`: what it draws, writes, resumes and refuses, on real pipelines."""

import base64
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dgpo_fast.config.command_line import run_command
from dgpo_fast.config.options import Policy
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.folder import NEEDED, EvaluationFolder, Row
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.evaluation.report import score_names
from dgpo_fast.evaluation.settings import read_settings
from dgpo_fast.models.latents import Pictures
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.lora import find_lora, merge_lora
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards.remote import png
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.train import train
from tests.evaluation.cases import DRAWING, PROMPTS, SMALL, TRAINING, index
from tests.processes import PythonProcess
from tests.servers import answering, wait_for


def pictures(folder: Path) -> np.ndarray:
    paths = sorted((folder / "images").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)


class Brightness:
    """Mean brightness, and its square as a part."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> tuple[np.ndarray, dict]:
        brightness = images.mean(axis=(1, 2, 3)) / 255
        return brightness, {"squared": brightness**2}


def test_what_an_evaluation_writes(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two images of each prompt of a file, each reward in a column of its own."""
    rewards = ["--rewards", "jpeg=0", f"brightness={__name__}:Brightness=0.5"]
    assert evaluate(["model", *DRAWING, *rewards, "--images-per-prompt", "2", "--output", "out"]) == 0
    out = workspace / "out"
    assert {path.name for path in out.iterdir()} == {
        "images",
        "index.jsonl",
        "results.json",
        "contact_sheet.png",
        "evaluation.yaml",
        ".lock",
        ".lock.json",
    }
    lines = index(out)
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [line["image"] for line in lines] == [f"images/{number:06d}.png" for number in range(12)]
    images, name = pictures(out), "brightness"
    assert not np.array_equal(images[0], images[1]), "each image of a prompt starts from noise of its own"
    brightness = images.mean((1, 2, 3)) / 255
    assert [line["scores"][name] for line in lines] == pytest.approx(brightness, abs=1e-6)
    assert [line["reward"] for line in lines] == pytest.approx(brightness / 2, abs=1e-6)
    results = json.loads((out / "results.json").read_text())
    assert results["scores"][name]["score_mean"] == pytest.approx(brightness.mean(), abs=1e-6)
    assert results["scores"][f"{name}/squared"]["score_mean"] == pytest.approx((brightness**2).mean(), abs=1e-6)
    assert set(results["scores"]) == {"reward", "jpeg", "jpeg/kilobytes", name, f"{name}/squared"}
    assert (results["images_count"], results["prompts_count"], results["drawn_count"]) == (12, 6, 12)
    assert results["image_width_px"] == 16 and results["made_with"]["weights_sha256"] and results["date_utc"]
    assert {"torch", "diffusers", "dgpo_fast"} <= set(results["versions"])
    assert not results["geneval"], "these prompts are not GenEval's"
    assert Image.open(out / "contact_sheet.png").width > 500
    output = capsys.readouterr().out
    assert "12/12 images" in output and "weighted sum" in output and "all" in output


DRAWBENCH = """Prompts,Category
a photo of a red circle,Colors
a photo of a blue star,Colors
a photo of a green ring,Colors
a photo of two squares,Counting
a photo of three rings,Counting
a photo of four stars,Counting
"""


def judges(path: str, body: bytes, _: object) -> dict:
    """DeQA-Score and UnifiedReward, as their servers answer: the darker, and the more it is as its caption says, the
    better."""
    content = {part["type"]: part for part in json.loads(body)["messages"][0]["content"]}
    picture = png.decode_png(base64.b64decode(content["image_url"]["image_url"]["url"].split(",")[1]), 10**6)
    brightness = float(picture.mean()) / 255
    if path.startswith("/deqa"):
        assert content["text"]["text"] == "How would you rate the quality of this image?"
        is_noise = len(np.unique(picture.reshape(-1, 3), axis=0)) > 0.9 * picture.shape[0] * picture.shape[1]
        good = 0.1 if is_noise else 1 - 0.8 * brightness
        words = [{"token": word, "logprob": math.log(one)} for word, one in (("good", good), ("bad", 1 - good))]
        levels = {"content": [{"token": "good", "top_logprobs": words}]}
        return {"choices": [{"message": {"content": "The quality of the image is good."}, "logprobs": levels}]}
    color = ("red", "green", "blue")[int(picture[::8, ::8].reshape(-1, 3).mean(0).argmax())]
    score = 4 - brightness + (f" {color} " in content["text"]["text"])
    return {"choices": [{"message": {"content": f"It is so.\nFinal Score: {score:.3f}"}}]}


def test_the_documented_metrics_that_training_never_saw(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command in docs/evaluation.md, but for its models: DrawBench's file, three rewards here and its two judges,
    each with a mean and an interval in all and per category, and on the scale that papers print."""
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"evaluate runs/NAME (--prompts DrawBench\.csv --rewards .*)", page)
    (workspace / "DrawBench.csv").write_text(DRAWBENCH)
    args = command.replace("aesthetic", f"brightness={__name__}:Brightness").replace("imagereward", "jpeg").split()
    args.remove("pickscore")
    with answering(judges) as url:
        for name, text in re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)```", page, re.DOTALL):
            (workspace / name).write_text(re.sub(r"http://\S+", f"{url}/{name}", text))
        assert evaluate(["tiny", *args, "--num-inference-steps", "2", "--output", "out"]) == 0
    lines = index(workspace / "out")
    assert [(line["prompt"], line["tag"]) for line in lines] == [
        tuple(row.split(",")) for row in DRAWBENCH.splitlines()[1:]
    ]
    results = json.loads((workspace / "out/results.json").read_text())
    names = ["brightness", "jpeg", "deqa", "unifiedreward"]
    assert {*names, "deqa/raw", "unifiedreward/raw"} <= set(results["scores"])
    for t_95, rows, found in [
        (2.570582, lines, results["scores"]),
        (4.302653, lines[:3], results["tags"]["Colors"]),
        (4.302653, lines[3:], results["tags"]["Counting"]),
    ]:
        for name in [*names, "deqa/raw", "unifiedreward/raw"]:
            scores = np.array([row["scores"][name] for row in rows])
            half = t_95 * scores.std(ddof=1) / math.sqrt(len(scores))
            assert found[name]["score_mean"] == pytest.approx(scores.mean())
            assert half > 0 and found[name]["score_ci95"] == pytest.approx(
                [scores.mean() - half, scores.mean() + half], rel=1e-4
            )
        for judge in ("deqa", "unifiedreward"):
            assert found[f"{judge}/raw"]["score_mean"] == pytest.approx(5 * found[judge]["score_mean"], rel=1e-5)
    output = capsys.readouterr().out
    for tag, prompts, intervals in (("Colors", 3, 0), ("Counting", 3, 0), ("all", 6, len(names) + 1)):
        found = re.findall(rf"[│ ]{tag} .*", output)
        assert "".join(found).count("±") == intervals, "and the weighted sum; three prompts show none"
        assert all(line.split("│")[-3:-1] == [f"{prompts:>8} ", f"{prompts:>7} "] for line in found)


def test_a_sum_is_a_score_of_its_own_where_it_is_one() -> None:
    """A lone reward of weight 1 is its own sum, whatever is in its name or its parts'."""
    rows = [Row(0, Prompt("a"), 0.5, {"http://gpu2:8000": 0.5, "http://gpu2:8000/queue": 1.0})]
    names = ["http://gpu2:8000", "http://gpu2:8000/queue"]
    assert score_names(rows, ["http://gpu2:8000"]) == names
    assert score_names(rows, ["taste=http://gpu2:8000"]) == names
    assert score_names(rows, ["http://gpu2:8000=2"]) == ["reward", *names]


def test_geneval_by_hand_on_the_shipped_pipeline(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The overall score is the mean of the tags' shares, here recomputed from the index; two prompts of each tag are
    too few for an interval."""
    assert evaluate(["tiny", "--images", "24", "--images-per-prompt", "2", "--output", "out"]) == 0
    lines = index(workspace / "out")
    shares = {}
    for tag in {line["tag"] for line in lines}:
        judged = [line["scores"]["shapes/correct"] for line in lines if line["tag"] == tag]
        assert len(judged) == 4
        shares[tag] = sum(judged) / 4
    found = json.loads((workspace / "out" / "results.json").read_text())["geneval"]["shapes"]
    assert {tag: one["correct_images_share"] for tag, one in found["tags"].items()} == shares
    assert found["overall_score"] == pytest.approx(sum(shares.values()) / 6)
    line = f"GenEval's overall score by shapes: {found['overall_score']:.4f} (mean over 6 tags"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("what", ["lora", "full"])
def test_a_run_is_evaluated_as_it_evaluated_itself(what: str, workspace: Path) -> None:
    """What a run saved, loaded as any pipeline or LoRA, gives the merged policy's last pictures to 1/255."""
    (workspace / "small.yaml").write_text(yaml.safe_dump({**TRAINING, "model": str(workspace / "model")}))
    train(
        ["small.yaml", "--name", "run", "--policy.train", what, "--optimizer.lr", "0.03" if what == "lora" else "1e-3"]
    )
    assert evaluate(["runs/run"]) == 0
    assert evaluate(["runs/run", "--weights", "before"]) == 0
    for folder, file in (("run", "after"), ("run-before", "before")):
        ours, theirs = (
            workspace / "evaluations" / folder,
            Evaluation.load(workspace / f"runs/run/evaluation_{file}.npz"),
        )
        assert [line["prompt"] for line in index(ours)] == [prompt.text for prompt in theirs.prompts]
        assert np.abs(pictures(ours) - theirs.images).max() <= 1
        assert [line["reward"] for line in index(ours)] == pytest.approx(theirs.rewards, abs=1e-4)
    before, after = (pictures(workspace / "evaluations" / name) for name in ("run-before", "run"))
    assert np.abs(before - after).max() > 5, "training matters to these pictures"
    if what == "lora":
        settings = ["--prompts", "none.txt", "--lora"]
        (workspace / "none.txt").write_text("".join(f"{prompt.text}\n" for prompt in theirs.prompts))
        for lora in ("runs/run", "runs/run/pytorch_lora_weights.safetensors"):
            evaluate(["model", *SMALL, "--num-inference-steps", "3", *settings, lora, "--output", "plain"])
            assert np.array_equal(pictures(workspace / "plain"), after)
            shutil.rmtree(workspace / "plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_lora_is_the_behaviour_policy_to_the_last_bit(
    dtype: torch.dtype, workspace: Path, random_pipeline: Path
) -> None:
    load = {"revision": None, "device": torch.device("cpu"), "dtype": dtype}
    trained = load_pipeline(str(random_pipeline), **load)
    models = PolicyModels(trained.transformer, Policy(lora_rank=4, lora_alpha=8.0), seed=0)
    for weight in models.weights.values():
        torch.nn.init.normal_(weight, std=0.1)
    models.save(models.weights, workspace, trained)
    models.load_behaviour(models.weights)
    merged = load_pipeline(str(random_pipeline), **load)
    merge_lora(merged, find_lora(workspace))
    expected = dict(models.behaviour.named_parameters())
    found = dict(merged.transformer.named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], one) for name, one in models.base.named_parameters()), "it has an effect"


def test_ctrl_c_and_sigkill_lose_nothing(workspace: Path) -> None:
    """Stopped twice, the same command goes on to what an undisturbed one gives; nothing is drawn again."""
    args = ["model", *SMALL, "--images-per-prompt", "50", "--batch-size", "1", "--output"]
    evaluate([*args, "undisturbed"])
    out, command = workspace / "out", ["-m", "dgpo_fast.evaluate", *args, "out"]
    process = PythonProcess(command)
    wait_for(lambda: (out / "images/000007.png").exists())
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output + errors
    done = len(index(out))
    last = output.splitlines()[-1]
    assert 8 <= done < 300 and last.startswith(f"stopped: {done} of 300 images are drawn and scored")
    assert last.endswith("python -m dgpo_fast.evaluate " + " ".join(args) + " out")
    process = PythonProcess(command)
    wait_for(lambda: len(index(out)) > done)
    process.kill()
    kept = {path.name: path.stat().st_mtime_ns for path in sorted((out / "images").iterdir())[: len(index(out))]}
    assert not (out / "results.json").exists(), "it was killed before its end"
    assert evaluate([*args, "out"]) == 0
    assert all((out / "images" / name).stat().st_mtime_ns == changed for name, changed in kept.items())
    assert (out / "index.jsonl").read_text() == (workspace / "undisturbed/index.jsonl").read_text()
    assert np.array_equal(pictures(out), pictures(workspace / "undisturbed"))
    clock = ("date_utc", "wall_s", "drawn_count")
    results = [json.loads((workspace / name / "results.json").read_text()) for name in ("out", "undisturbed")]
    assert results[0]["drawn_count"] == 300 - len(kept)
    assert {k: v for k, v in results[0].items() if k not in clock} == {
        k: v for k, v in results[1].items() if k not in clock
    }


def test_a_torn_line_or_a_lost_picture_is_drawn_again_with_its_batch(workspace: Path) -> None:
    args = ["model", *SMALL, "--images-per-prompt", "2", "--output", "out"]
    evaluate(args)
    whole, lines = pictures(workspace / "out"), (workspace / "out/index.jsonl").read_text()
    for damage in (
        lambda: (workspace / "out/index.jsonl").write_text(lines[: len(lines) * 6 // 10]),
        lambda: (workspace / "out/images/000006.png").unlink(),
    ):
        damage()
        evaluate(args)
        assert (workspace / "out/index.jsonl").read_text() == lines
        assert np.array_equal(pictures(workspace / "out"), whole)
        assert json.loads((workspace / "out/results.json").read_text())["drawn_count"] == 8
    evaluate(args)
    assert json.loads((workspace / "out/results.json").read_text())["drawn_count"] == 0, "all of it is there"


def test_images_do_not_pile_up_in_memory(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is drawn, the one before it may still be scored; no third one is alive."""
    alive, counts, original = [], [], Sampler.decode

    def decode(self: Sampler, x0: torch.Tensor) -> Pictures:
        counts.append(sum(reference() is not None for reference in alive))
        pictures = original(self, x0)
        alive.append(weakref.ref(pictures.images))
        return pictures

    monkeypatch.setattr(Sampler, "decode", decode)
    evaluate(["model", *SMALL, "--images-per-prompt", "6", "--output", "out"])
    assert len(counts) == 9 and max(counts) <= 2


MISTAKES = {
    # arguments: the line that they give
    "": "error: command line: name a model or a run's folder, as in `python -m dgpo_fast.evaluate tiny`",
    "nowhere --rewards jpeg": "error: model 'nowhere': no such folder, and no name on the hub (organisation/name)",
    "runs/nosuch": "error: runs/nosuch: no such run or folder: there is runs/colour",
    "runs/color --rewards shape": "error: runs/color: no such run or folder: did you mean runs/colour?",
    "colour": "error: model 'colour': no such folder: did you mean runs/colour?",
    "./my_sd3": "error: ./my_sd3: no such run or folder",
    "a/b/c": "error: a/b/c: no such run or folder",
    "empty/sd3": "error: empty/sd3: no such run or folder",
    "tiny --promts a.txt": "error: command line: unknown setting 'promts': did you mean 'prompts'?",
    "tiny --images 0": "error: command line: images: input should be greater than or equal to 1",
    "tiny --prompts missing.txt": "error: missing.txt: no such prompt file",
    "tiny --prompts geneval --images none": "error: --prompts geneval: a generator has no end: say how many",
    "tiny --prompts none": "error: --prompts none: tiny has no prompts of its own; name a file or a generator",
    "tiny --prompts plain.txt": "error: plain.txt:1: ",
    "tiny --rewards shape": "error: no reward 'shape': did you mean 'shapes'?",
    "tiny --recipe tiny-shape": "error: unknown recipe 'tiny-shape': did you mean 'tiny-shapes'?",
    "tiny --weights before": "error: --weights before: tiny is not a run; leave it out",
    "tiny --lora nowhere": "error: LoRA 'nowhere': no such file or folder",
    "tiny --lora empty": "error: LoRA 'empty': no .safetensors file is there",
    "tiny --lora junk.safetensors": "error: LoRA 'junk.safetensors' cannot be read: ",
    "tiny --lora other.safetensors": "error: LoRA 'other.safetensors' cannot be loaded into this model: ",
    "tiny --resolution 36": "error: resolution 36: this model draws multiples of ",
    "tiny --output plain.txt": "error: plain.txt exists and is no evaluation: choose another --output",
    "tiny --output run": "error: run exists and is no evaluation: choose another --output",
    "tiny --device gpu": "error: --device gpu: no such device",
    "run": "error: run: the run has not finished, so it has no trained weights yet (pytorch_lora_weights.safetensors)",
    "run --lora x": "error: --lora x: run is a run, which has its own weights",
    "run --recipe tiny-ocr": "error: --recipe tiny-ocr: run is a run, which has its own settings; leave it out",
    "done": "error: done is an evaluation, not a model: --side-by-side compares it with another one",
    "--side-by-side": "error: command line: --side-by-side takes two evaluations, runs or models, or one run",
    "--side-by-side run": "error: run: the run has not finished, so it has no trained weights yet (",
    "--side-by-side tiny scored": "error: tiny and scored cannot be set side by side: no reward scores both "
    "(shapes and jpeg): give both the same --rewards",
    "--side-by-side tiny scored --seed 1": "error: tiny and scored cannot be set side by side: their noise has the ",
    "--side-by-side tiny": "error: --side-by-side tiny: is not a run, which has a before and an after; give two",
    "--side-by-side done done --seed 1": "error: command line: --seed: has no effect, since both evaluations",
    "--side-by-side done done --pairs many": "error: command line: --pairs many: give a whole number from 2 up",
    "--side-by-side done done": "error: done/evaluation.yaml: lacks 'lora'; the evaluation is damaged, make it again",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_bad_input_gives_one_line_and_makes_nothing(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "run", "done", "scored"):
        (tmp_path / folder).mkdir()
    (tmp_path / "plain.txt").write_text("a cat\n")
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04 no tensors")
    save_file({"transformer.transformer_blocks.99.attn.to_q.lora_A.weight": torch.zeros(2, 2)}, "other.safetensors")
    (tmp_path / "run/config.yaml").write_text("policy: {train: lora}\n")
    (tmp_path / "done/evaluation.yaml").write_text("model: tiny\n")
    made_with = {**dict.fromkeys(NEEDED), "rewards": ["jpeg"], "seed": 0}
    (tmp_path / "scored/evaluation.yaml").write_text(yaml.safe_dump(made_with))
    (tmp_path / "runs/colour").mkdir(parents=True)
    (tmp_path / "runs/colour/config.yaml").write_text("recipe: tiny-shapes\n")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments.split()])
    assert run_command(evaluate) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(MISTAKES[arguments]), errors
    assert sorted(tmp_path.rglob("*")) == before


def test_defaults_come_from_the_run_or_the_recipe(workspace: Path) -> None:
    (workspace / "run").mkdir()
    (workspace / "run/config.yaml").write_text(
        "rewards: [ocr]\nevaluation: {images: 40, seed: 3}\nrollout: {shift: 2}\n"
    )
    of_run = read_settings(["run", "--num-inference-steps", "5"])
    assert (of_run.rewards, of_run.images, of_run.seed, of_run.shift) == (("ocr",), 40, 3, 2.0)
    assert (of_run.prompts, of_run.num_inference_steps, of_run.output) == (None, 5, "evaluations/run")
    of_file = read_settings(["run", "--prompts", "prompts.txt", "--weights", "before"])
    assert of_file.images is None, "all prompts of the file"
    assert of_file.output == "evaluations/run-before-prompts"
    plain = read_settings(["organisation/sd3", "--recipe", "sd35m-ocr", "--lora", "my/lora.safetensors"])
    assert (plain.prompts, plain.resolution, plain.output) == ("signs", 512, "evaluations/sd3-lora")


def test_the_index_survives_its_file(tmp_path: Path) -> None:
    """Any prompt and score that a row may hold is read as it was written."""
    folder = EvaluationFolder(tmp_path)
    (tmp_path / "images").mkdir()
    texts = ["a\u2028b", "„ß“ \U0001f600", '"quoted" \\n </script>']
    rows = [
        Row(n, Prompt(text, {"tag": "t", "n": n}), float("nan") if n else 0.1, {"x/y": 1e-9})
        for n, text in enumerate(texts)
    ]
    for row in rows:
        folder.write_image(row.sample, np.full((4, 4, 3), row.sample, np.uint8))
    folder.append(rows[:2])
    folder.append(rows[2:])
    found = folder.rows()
    assert [(row.prompt, row.scores, row.failed) for row in found] == [(r.prompt, r.scores, r.failed) for r in rows]
    assert (folder.read_image(found[2]) == 2).all()


def test_the_command_starts_without_torch() -> None:
    """A wrong command line is refused, and help shown, before the imports that take seconds."""
    script = "import sys; import dgpo_fast.evaluate; assert not {'torch', 'diffusers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    done = subprocess.run([sys.executable, "-m", "dgpo_fast.evaluate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--images-per-prompt" in done.stdout and "--side-by-side" in done.stdout
