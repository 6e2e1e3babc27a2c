"""Images that are not square: read, drawn, trained, evaluated and shown."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Config, Policy
from dgpo_fast.config.reading import parse_overrides, read_yaml, resolve, to_dict, write_yaml
from dgpo_fast.engine.recorded import RecordedRollouts
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.memory.predict import Predictor
from dgpo_fast.models.family import Guidance, family_of
from dgpo_fast.models.latents import decode_pixels, latent_shape
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.models.work import FUSED_ATTENTION, ModelWork
from dgpo_fast.profiling.command import profile
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import Sampler, initial_noise, plain_decoding
from dgpo_fast.rollout.schedule import make_schedule, make_scheduler
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.engine.cases import EngineCase, make_config
from tests.engine.tape import TapeRecorder
from tests.evaluation.cases import PROMPTS, SMALL
from tests.runs import untimed
from tests.sd3 import medium, sample_shape, transformer_in

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(random_pipeline: Path) -> StableDiffusion3Pipeline:
    return load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32)


def read(text: str, folder: Path) -> Config:
    """Settings from a line of YAML."""
    (folder / "settings.yaml").write_text(f"rollout:\n  resolution: {text}\n")
    return resolve(Config(), read_yaml(folder / "settings.yaml"), "settings.yaml")


SIZES = {"64": 64, "64x64": 64, "512x768": "512x768", "768X512": "768x512", "16×32": "16x32"}
NO_SIZES = ["512x", "x", "512x768x3", "512,768", "512 x 768", "8:30", "1e3", "64.5", "-32x64", ""]
TOO_SMALL = ["0x512", "512x0", "15", "8x64", "0x400"]


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_height_and_width_or_one_side(text: str, tmp_path: Path) -> None:
    given = resolve(Config(), parse_overrides(["--rollout.resolution", text]), "command line")
    assert given.rollout.resolution == read(text, tmp_path).rollout.resolution == SIZES[text]
    write_yaml(given, tmp_path / "config.yaml")
    assert resolve(Config(), read_yaml(tmp_path / "config.yaml"), "config.yaml") == given


@pytest.mark.parametrize("text", [*NO_SIZES, *TOO_SMALL])
def test_what_is_no_size_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    remedy = "write HEIGHTxWIDTH in pixels, such as 512x768, or one number for a square"
    if text in TOO_SMALL:
        remedy = "each side must be 16 pixels or more"
    with pytest.raises(UserError) as caught:
        resolve(Config(), parse_overrides([f"--rollout.resolution={text}"]), "command line")
    assert str(caught.value) == f"command line: rollout.resolution: {remedy}, not {text!r}"
    with pytest.raises(UserError) as caught:
        read(repr(text) if text == "" else text, tmp_path)
    assert str(caught.value).startswith(f"settings.yaml: rollout.resolution: {remedy}, not ")


@pytest.mark.parametrize("text", ["[512, 768]", "{height: 512}", "true"])
def test_other_kinds_of_values_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^settings.yaml: rollout.resolution: write HEIGHTxWIDTH in pixels, "):
        read(text, tmp_path)


@pytest.mark.parametrize(
    ("resolution", "nearest"),
    [
        ("18x24", "16 or 20 high, 24 wide"),
        ("24x18", "24 high, 16 or 20 wide"),
        ("17x70", "16 or 20 high, 64 wide"),  # beyond the table of position embeddings
        (18, "16 or 20"),
        (68, "64"),
    ],
)
def test_sizes_that_a_model_cannot_draw(
    resolution: int | str, nearest: str, pipeline: StableDiffusion3Pipeline
) -> None:
    with pytest.raises(UserError) as caught:
        latent_shape(family_of(pipeline.transformer), resolution)
    assert str(caught.value) == (
        f"rollout.resolution {resolution}: this model draws multiples of 4 up to 64 pixels; the nearest: {nearest}"
    )


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16), (20, 28), (16, 64), (64, 20)])
def test_pictures_are_those_of_diffusers(
    height: int, width: int, solver: str, pipeline: StableDiffusion3Pipeline
) -> None:
    """Latents and pixels, at an odd number of patches and at the end of the position table too."""
    sampler = Sampler(
        pipeline,
        pipeline.transformer,
        PromptEncoder(pipeline, max_sequence_length=9),
        resolution=f"{height}x{width}",
        decode=plain_decoding(pipeline.vae, 2),
    )
    assert sampler.image_size == (height, width) and sampler.shape == (16, height // 2, width // 2)
    draw, prompts = Draw(make_schedule(solver, 4, 3.0), Guidance(4.5), batch_size=2), ["a cat", "two birds"]
    x0 = torch.cat(list(sampler.batches(prompts, draw, first=3, seed=5)))
    pixels = decode_pixels(pipeline.vae, x0)
    original, pipeline.scheduler = pipeline.scheduler, make_scheduler(solver, 3.0)
    call = {
        "latents": initial_noise(sampler.shape, torch.arange(3, 5), seed=5, draw=0),
        "num_inference_steps": 4,
        "guidance_scale": 4.5,
        "max_sequence_length": 9,
        "height": height,
        "width": width,
    }
    theirs_x0 = pipeline(prompts, output_type="latent", **call).images
    theirs = pipeline(prompts, output_type="np", **call).images
    pipeline.scheduler = original
    scale = theirs_x0.abs().max().item()
    assert (x0 - theirs_x0).abs().max() <= 1e-5 * max(scale, 1)
    ours = (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    assert ours.shape == theirs.shape == (2, height, width, 3) and np.abs(ours - theirs).max() <= 1e-5


@pytest.mark.parametrize("train", ["lora", "full"])
def test_flops_are_torchs(train: str, random_pipeline: Path) -> None:
    transformer = transformer_in(random_pipeline)
    shape = sample_shape(latent_shape(family_of(transformer), "20x28"), (21, 48), 32)
    work = ModelWork(transformer, Policy(train=train, lora_rank=4), torch.float32, shape)  # type: ignore[arg-type]
    with FUSED_ATTENTION, FlopCounterMode(display=False) as forward:
        out = shape.predict(work.policy, 3, torch.float32)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    with FlopCounterMode(display=False) as decode:
        work.vae.decode(shape.latents(3, torch.float32))
    assert work.count("policy forward", 3).total_flops == forward.get_total_flops() > 0
    assert work.count("backward", 3).total_flops == backward.get_total_flops() > 0
    assert work.count("decode", 3).total_flops == decode.get_total_flops() > 0


def test_memory_goes_by_the_pixels() -> None:
    """Of SD3.5-Medium: as much upright as across, and between the squares of both sides."""
    predictor = Predictor(medium(), torch.bfloat16)
    peaks = []
    for resolution in ("512", "512x768", "768x512", "768"):
        config = configure(["sd35m-geneval", "--rollout.resolution", resolution])
        peaks.append(predictor.predict(config, 4).phases["training"])
    small, across, upright, large = peaks
    assert small < across < large and across == upright


@pytest.mark.parametrize("resolution", ["20x28", "16x64"])
def test_savings_draw_and_learn_the_same(resolution: str, random_pipeline: Path) -> None:
    """Kernels, decoder, checkpointing and recorded rollouts that are made for one shape, on another one."""
    cases = []
    for savings in ({}, {"attention": "matmul", "decoder": "fast", "checkpointing": "blocks", "batch_timesteps": True}):
        config = make_config(**savings)
        config = replace(config, rollout=replace(config.rollout, resolution=resolution))
        cases.append(EngineCase(random_pipeline, config))
    plain, saving = cases
    saving.sampler.solve = RecordedRollouts(TapeRecorder())
    expected, found = plain.rollout(), saving.rollout()
    assert torch.allclose(found, expected, atol=1e-4)
    height, width = map(int, resolution.split("x"))
    pictures = plain.sampler.decode(expected).images, saving.sampler.decode(expected).images
    assert pictures[0].shape == pictures[1].shape == (7, height, width, 3)
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1
    (loss, gradient), (saved_loss, saved_gradient) = plain.gradient(), saving.gradient()
    assert torch.allclose(saved_loss, loss, rtol=1e-4)
    assert (saved_gradient - gradient).norm() <= 1e-3 * gradient.norm()


SHORT = ["--iterations", "2", "--evaluation.images", "4"]


def test_a_whole_run_and_its_resumption(workspace: Path, figures: None, capsys: pytest.CaptureFixture) -> None:
    """LoRA, drawn, learnt and evaluated at 16 × 24, its picture sheet; killed after the first of two iterations."""
    wide = ["small.yaml", "--rollout.resolution", "16x24", *SHORT]
    train(wide)
    out, run = capsys.readouterr().out, workspace / "runs/run"
    assert "rollout.resolution 16x24, 16 high, 24 wide: the model's own is 16 × 16 pixels" in out
    for name in ("before", "after"):
        assert Evaluation.load(run / f"evaluation_{name}.npz").images.shape == (4, 16, 24, 3)
    with Image.open(run / "before_after.png") as wide_sheet:
        wide_ratio = wide_sheet.height / wide_sheet.width
    copy = Path(shutil.copytree(run, workspace / "runs/copy"))
    shutil.rmtree(copy / "checkpoints/iteration-000002")
    (copy / "summary.json").unlink()
    assert train(["--resume", str(copy)]) == 0
    assert untimed(copy) == untimed(run)
    ours, theirs = load_newest(copy / "checkpoints")[0], load_newest(run / "checkpoints")[0]
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    with pytest.raises(UserError, match=r"'rollout\.resolution' cannot change within a run"):
        train(["--resume", str(copy), "--rollout.resolution", "24x16"])
    train([*("24x16" if arg == "16x24" else arg for arg in wide), "--name", "upright"])
    with Image.open(workspace / "runs/upright/before_after.png") as upright_sheet:
        assert upright_sheet.height / upright_sheet.width > wide_ratio, "the sheet has the images' shape"
    assert untimed(workspace / "runs/upright") != untimed(run)


def test_rollouts_with_noise_and_their_objective(workspace: Path) -> None:
    grpo = ["--objective", "flow_grpo", "--rollout.solver", "euler", "--rollout.noise-level", "0.7"]
    grpo += ["--ema.switch-ema-ref", "none", "--rollout.resolution", "16x24", *SHORT]
    assert train(["small.yaml", *grpo]) == 0
    assert all(line["grad_norm"] > 0 for line in untimed(workspace / "runs/run"))


def test_offline_groups_have_their_shape(workspace: Path) -> None:
    offline = ["small.yaml", "--data.source", "offline", "--data.offline-groups", "3", "--data.folder", "groups"]
    train([*offline, "--rollout.resolution", "16x24", "--name", "a", *SHORT])
    train([*offline, "--rollout.resolution", "16x24", "--name", "b", *SHORT])
    assert untimed(workspace / "runs/a") == untimed(workspace / "runs/b")
    for other in ("24x16", "16", "none"):
        with pytest.raises(UserError, match=r"rollout\.resolution changed since its groups were drawn: name another"):
            train([*offline, "--rollout.resolution", other, "--name", "c", *SHORT])


def test_own_rewards_are_tried_out_at_the_runs_size(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "shape_reward.py").write_text(
        "import numpy as np\n"
        "def reward(images, prompts, metadata):\n"
        "    assert images.shape[1:] == (16, 24, 3), images.shape\n"
        "    return np.zeros(len(images)), {}\n"
    )
    monkeypatch.syspath_prepend(workspace)
    run = ["small.yaml", "--rewards", "shape_reward:reward", "--rollout.resolution"]
    Trainer(build(configure([*run, "16x24"]))).close()
    with pytest.raises(UserError, match=r"tried out on .*: AssertionError: \(\d+, 24, 16, 3\)"):
        build(configure([*run, "24x16"]))


def test_evaluations_and_their_page(workspace: Path, random_pipeline: Path) -> None:
    (workspace / "prompts.txt").write_text("\n".join(PROMPTS))
    drawn = [*SMALL[: SMALL.index("--resolution")], *SMALL[SMALL.index("--resolution") + 2 :], "--resolution"]
    for name, size, solver in (("a", "16x64", "euler"), ("b", "16x64", "dpmpp_2m"), ("c", "64x16", "euler")):
        evaluate([str(random_pipeline), *drawn, size, "--output", name, "--solver", solver])
    with Image.open("a/images/000000.png") as wide, Image.open("c/images/000000.png") as upright:
        assert wide.size == (64, 16) and upright.size == (16, 64)
    results = json.loads(Path("c/results.json").read_text())
    assert (results["image_height_px"], results["image_width_px"]) == (64, 16)
    assert results["made_with"]["resolution"] == "64x16"
    with Image.open("a/contact_sheet.png") as wide, Image.open("c/contact_sheet.png") as upright:
        assert wide.width / wide.height > 3 * upright.width / upright.height
    evaluate(["--side-by-side", "a", "b", "--output", "page.html"])
    page = Path("page.html").read_text()
    assert '"width_px": 64, "height_px": 16' in page and "16 high, 64 wide" in page
    with pytest.raises(UserError, match="a and c cannot be set side by side: their images are 16 high, 64 wide, and"):
        evaluate(["--side-by-side", "a", "c"])
    with pytest.raises(UserError, match="their images are 16 high, 64 wide, and 16 × 16 pixels: evaluate both with"):
        evaluate(["--side-by-side", "a", str(random_pipeline), *drawn, "16", "--output", "never.html"])
    assert not Path("evaluations").exists(), "found before anything is drawn"
    with pytest.raises(UserError, match=r"^b was made with resolution 16x64, not 64x16: choose another --output"):
        evaluate([str(random_pipeline), *drawn, "64x16", "--output", "b"])
    with pytest.raises(UserError, match=r"^resolution 18x24: this model draws multiples of 4 up to 64 pixels; the"):
        evaluate([str(random_pipeline), *drawn, "18x24", "--output", "d"])


def test_a_profile(workspace: Path) -> None:
    assert profile(["small.yaml", "--rollout.resolution", "16x24", "--iterations", "1"]) == 0


def test_old_settings_are_read_and_resumed(workspace: Path) -> None:
    """A run's folder from before: the shift a number, the resolution one number or null."""
    settings = yaml.safe_load(Path("small.yaml").read_text())
    for name, resolution in (("old", 16), ("older", None)):
        settings["name"], settings["rollout"]["shift"], settings["rollout"]["resolution"] = name, 3.0, resolution
        Path("old.yaml").write_text(yaml.safe_dump(settings))
        train(["old.yaml", *SHORT])
        kept = read_yaml(Path(f"runs/{name}/config.yaml"))["rollout"]
        assert (kept["shift"], kept["resolution"]) == (3.0, resolution)
        assert train(["--resume", f"runs/{name}", "--iterations", "3"]) == 0
    train(["small.yaml", *SHORT])
    assert read_yaml(Path("runs/run/config.yaml"))["rollout"]["shift"] == 3.0, "the model's own is kept with the run"
    assert untimed(Path("runs/run")) == untimed(Path("runs/old"))[:2] == untimed(Path("runs/older"))[:2]
    assert to_dict(Config())["rollout"]["shift"] is None
