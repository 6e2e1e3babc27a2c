"""Model folders and LoRAs that other people and other trainers wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgpo_fast.build import Parts, build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Policy
from dgpo_fast.config.reading import read_yaml
from dgpo_fast.config.recipes import RECIPES
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.settings import read_settings
from dgpo_fast.models.families.sd3 import SD35_MEDIUM
from dgpo_fast.models.latents import decode_pixels
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.lora import find_lora, merge_lora
from dgpo_fast.models.own_settings import differences
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.models.random_weights import random_pipeline as make_random_pipeline
from dgpo_fast.rollout.schedule import make_schedule
from dgpo_fast.run.start import read_start
from dgpo_fast.train import train
from tests.sd3 import family_in, medium

FILES = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
}


@pytest.fixture
def model(random_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the random pipeline, to be changed."""
    return Path(shutil.copytree(random_pipeline, tmp_path / "model"))


def loaded(folder: Path):
    return load_pipeline(str(folder), revision=None, device=torch.device("cpu"), dtype=torch.float32)


def change(folder: Path, part: str, to: Callable[[torch.Tensor], torch.Tensor], suffix: str = "") -> str:
    """Writes `part`'s first weight anew, in a file with `suffix`; returns the weight's name."""
    file = folder / part / f"{FILES[part]}.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = to(tensors[name])
    file.unlink()
    save_file(tensors, file.with_name(f"{FILES[part]}{suffix}.safetensors"), metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
def test_weights_that_are_not_finite_are_named(part: str, number: float, model: Path) -> None:
    change(model, part, lambda weight: torch.full_like(weight, number))
    with pytest.raises(UserError, match=r"has numbers that are not finite, in .*: the file is damaged") as caught:
        loaded(model)
    assert str(model) in str(caught.value)


def test_weights_in_a_variant_alone_are_found(model: Path, random_pipeline: Path) -> None:
    for part in FILES:
        change(model, part, torch.Tensor.clone, suffix=".fp16")
    expected = dict(loaded(random_pipeline).transformer.named_parameters())
    assert all(weight.equal(expected[name]) for name, weight in loaded(model).transformer.named_parameters())


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ("text_encoder_3", 'or go without it: "text_encoder_3": [null, null] in model_index.json'),
        ("vae", "or download it again"),
    ],
)
def test_a_part_that_is_listed_and_gone_is_named(part: str, remedy: str, model: Path) -> None:
    shutil.rmtree(model / part)
    with pytest.raises(UserError) as caught:
        loaded(model)
    assert str(caught.value) == (
        f"model '{model}' lacks {part}, which its model_index.json names: add the folder, {remedy}"
    )


def test_a_decoder_without_a_shift(model: Path) -> None:
    """As diffusers' own configuration has it: none is 0."""
    path = model / "vae/config.json"
    settings = json.loads(path.read_text())
    latents = torch.randn(2, settings["latent_channels"], 8, 8)
    pixels = []
    for shift in (None, 0.0):
        path.write_text(json.dumps({**settings, "shift_factor": shift}))
        pixels.append(decode_pixels(loaded(model).vae, latents))
    assert pixels[0].equal(pixels[1])


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("vae/config.json", "scaling_factor"),
        ("transformer/config.json", "sample_size"),
        ("transformer/config.json", "pos_embed_max_size"),
        ("scheduler/scheduler_config.json", "shift"),
    ],
)
def test_a_number_that_is_null_is_named(file: str, number: str, model: Path) -> None:
    settings = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**settings, number: None}))
    with pytest.raises(UserError) as caught:
        loaded(model)
    assert str(caught.value) == (f"{model / file}: {number} is null: write the number that the model was trained with")


def peft_folder(folder: Path, weights: dict[str, torch.Tensor], **config: object) -> dict[str, torch.Tensor]:
    """A LoRA as PEFT saves it, of the query and value projections; what B·A of each is."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    products, factors = {}, {}
    for name in weights:
        if name.endswith((".attn.to_q.weight", ".attn.to_v.weight")):
            rows, columns = weights[name].shape
            rank = 2 if "to_q" in name else 4
            a = torch.randn(rank, columns, generator=generator)
            b = torch.randn(rows, rank, generator=generator)
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            products[name] = b @ a
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}))
    return products


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, {"to_q": 6 / 2, "to_v": 6 / 4}),
        ({"use_rslora": True}, {"to_q": 6 / 2**0.5, "to_v": 6 / 4**0.5}),
        ({"rank_pattern": {"to_v": 4}, "alpha_pattern": {"to_v": 1}}, {"to_q": 6 / 2, "to_v": 1 / 4}),
    ],
)
def test_a_lora_in_pefts_format_is_merged(config: dict, scales: dict, model: Path, tmp_path: Path) -> None:
    """W + alpha / rank · B·A, with the ranks and alphas of each layer."""
    pipeline = loaded(model)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    products = peft_folder(tmp_path / "lora", before, **config)
    merge_lora(pipeline, find_lora(tmp_path / "lora"))
    after = pipeline.transformer.state_dict()
    assert products and after.keys() == before.keys()
    for name, weight in after.items():
        scale = scales["to_q" if "to_q" in name else "to_v"]
        expected = before[name] + scale * products[name] if name in products else before[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "line"),
    [({"use_dora": True}, "is of a DoRA"), ({"peft_type": "IA3"}, "is of no LoRA: only LoRAs are read")],
)
def test_adapters_that_are_no_plain_lora_are_refused(config: dict, line: str, model: Path, tmp_path: Path) -> None:
    pipeline = loaded(model)
    peft_folder(tmp_path / "lora", pipeline.transformer.state_dict(), **config)
    with pytest.raises(UserError, match=line):
        merge_lora(pipeline, find_lora(tmp_path / "lora"))


def test_a_lora_that_is_not_finite_is_named(model: Path, tmp_path: Path) -> None:
    pipeline = loaded(model)
    peft_folder(tmp_path / "lora", pipeline.transformer.state_dict())
    file = tmp_path / "lora/adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=f"^LoRA '{file}' has numbers that are not finite, in "):
        merge_lora(pipeline, find_lora(tmp_path / "lora"))


def test_a_lora_whose_product_overflows_is_named(model: Path, tmp_path: Path) -> None:
    """Though each of its factors is finite."""
    pipeline = loaded(model)
    peft_folder(tmp_path / "lora", pipeline.transformer.state_dict(), lora_alpha=2e38)
    with pytest.raises(UserError, match=r"^the LoRA makes transformer\..*attn\.to_.* not finite in float32: its scale"):
        merge_lora(pipeline, find_lora(tmp_path / "lora"))


def test_a_saved_lora_is_the_same_for_loaders_that_read_no_header(model: Path, tmp_path: Path) -> None:
    """Those take W + B·A, which must be what the run drew with; diffusers, which reads the header, agrees."""
    pipeline = loaded(model)
    models = PolicyModels(pipeline.transformer, Policy(train="lora", lora_rank=4, lora_alpha=6.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(weight.shape, generator=generator) for name, weight in models.weights.items()}
    models.save(weights, tmp_path, pipeline)
    models.load_behaviour(weights)
    drew = models.behaviour.state_dict()
    factors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    merge_lora(pipeline, find_lora(tmp_path))
    by_diffusers, base = pipeline.transformer.state_dict(), loaded(model).transformer.state_dict()
    changed = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    assert changed
    for stem in changed:
        name = f"{stem.removeprefix('transformer.')}.weight"
        by_hand = base[name] + factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(by_hand, drew[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(by_diffusers[name], drew[name], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(drew[name], base[name], atol=0.1)


def edit(path: Path, **changes: object) -> None:
    """Changes settings in a JSON file; None removes one."""
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def run_of(model: Path, *args: str) -> Parts:
    """The parts of a run of `small.yaml` on `model`."""
    parts = build(configure(["small.yaml", "--model", str(model), *args]))
    parts.reward_pool.close()
    return parts


SHIFTS: dict[str, tuple[dict, float]] = {
    "shift": ({"shift": 5.0}, 5.0),
    "flow_shift of another scheduler": (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "shift": None,
            "flow_shift": 5,
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
        },
        5.0,
    ),
    "none, which is diffusers' 1": ({"shift": None}, 1.0),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_the_models_own_shift_is_the_default(
    name: str, model: Path, workspace: Path, capsys: pytest.CaptureFixture
) -> None:
    changes, own = SHIFTS[name]
    edit(model / "scheduler/scheduler_config.json", **changes)
    parts = run_of(model)
    assert parts.config.rollout.shift == own
    assert torch.equal(parts.draw.schedule.sigmas, make_schedule("dpmpp_2m", 4, own).sigmas)
    assert torch.equal(parts.eval_draw.schedule.sigmas, make_schedule("dpmpp_2m", 4, own).sigmas)
    assert "the model's own" not in capsys.readouterr().out
    parts = run_of(model, "--rollout.shift", "3")
    assert torch.equal(parts.draw.schedule.sigmas, make_schedule("dpmpp_2m", 4, 3.0).sigmas)
    assert f"rollout.shift 3: the model's own is {own:g}\n" in capsys.readouterr().out


def test_what_a_recipe_has_otherwise_is_said(model: Path, workspace: Path) -> None:
    """SD3.5-Medium's recipes have the release's values, which are said to be theirs if the model has others."""
    edit(model / "scheduler/scheduler_config.json", shift=5.0)
    family, rollout = family_in(model), RECIPES["sd35m-geneval"]().rollout
    asked = {"shift": 3.0, "resolution": rollout.resolution, "max_sequence_length": 128}
    assert list(differences(family, **asked, prefix="rollout.", recipe="sd35m-geneval")) == [
        "rollout.shift 3 (recipe sd35m-geneval): the model's own is 5",
        "rollout.resolution 512 (recipe sd35m-geneval): the model's own is 16 × 16 pixels",
    ]
    assert list(differences(medium(), **asked, prefix="rollout.", recipe="sd35m-geneval")) == [
        "rollout.resolution 512 (recipe sd35m-geneval): the model's own is 1024 × 1024 pixels"
    ]
    assert not list(differences(family, shift=5.0, resolution=16, max_sequence_length=9))


UNREAD: dict[str, tuple[dict, str]] = {
    "training timesteps": ({"num_train_timesteps": 500}, "num_train_timesteps 500: only models with 1000 can be drawn"),
    "no flow matching": (
        {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
        "DDIMScheduler: only models of flow matching can be drawn",
    ),
    "a shift by image size": (
        {"use_dynamic_shifting": True},
        "a shift by image size (use_dynamic_shifting) is not computed here; give one, as in --rollout.shift 3",
    ),
    "no number": ({"shift": "3"}, "shift '3' is not a number in (0, 100]; give one, as in --rollout.shift 3"),
    "zero": ({"shift": 0}, "shift 0 is not a number in (0, 100]; give one, as in --rollout.shift 3"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_schedulers_that_cannot_be_followed_are_refused(name: str, model: Path, workspace: Path) -> None:
    changes, line = UNREAD[name]
    file = model / "scheduler/scheduler_config.json"
    edit(file, **changes)
    with pytest.raises(UserError) as caught:
        run_of(model)
    assert str(caught.value) == f"{file}: {line}"
    with pytest.raises(UserError) as caught:
        evaluate([str(model), "--prompts", "prompts.txt", "--rewards", "jpeg", "--output", "never"])
    assert str(caught.value) == f"{file}: {line}".replace("--rollout.shift", "--shift")
    assert not Path("never").exists()


def test_what_else_a_scheduler_has_is_said(model: Path, workspace: Path, capsys: pytest.CaptureFixture) -> None:
    edit(
        model / "scheduler/scheduler_config.json", use_dynamic_shifting=True, use_karras_sigmas=True, shift_terminal=0.1
    )
    run_of(model, "--rollout.shift", "3")
    out = capsys.readouterr().out
    assert "rollout.shift 3: the model's own depends on the image's size (use_dynamic_shifting)\n" in out
    assert "the model's own scheduler has use_karras_sigmas True, shift_terminal 0.1, which is not read: " in out


def test_tokens_of_an_encoder_that_is_not_there_are_said(
    model: Path, workspace: Path, capsys: pytest.CaptureFixture
) -> None:
    edit(model / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    run_of(model)
    assert "rollout.max_sequence_length 9: this model has no T5 encoder; zeros stand" in capsys.readouterr().out
    run_of(model, "--rollout.max-sequence-length", "0")
    assert "T5" not in capsys.readouterr().out


def test_an_evaluation_has_the_models_own_shift_and_size(
    model: Path, workspace: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of a model that is no recipe's own. An earlier evaluation, with the shift as a number and no size, goes on."""
    edit(model / "scheduler/scheduler_config.json", shift=5.0)
    drawn = [str(model), "--prompts", "prompts.txt", "--rewards", "jpeg", "--num-inference-steps", "2"]
    drawn += ["--max-sequence-length", "9", "--device", "cpu"]
    evaluate([*drawn, "--output", "own"])
    made_with = read_yaml(Path("own/evaluation.yaml"))
    assert (made_with["shift"], made_with["resolution"]) == (5.0, None)
    assert "the model's own" not in capsys.readouterr().out
    evaluate([*drawn, "--shift", "5", "--resolution", "none", "--output", "own"])
    assert "10 of them are there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^own was made with shift 5\.0, not 3\.0: "):
        evaluate([*drawn, "--shift", "3", "--output", "own"])
    evaluate([*drawn, "--shift", "3", "--output", "three"])
    assert "shift 3: the model's own is 5\n" in capsys.readouterr().out
    name = "images/000000.png"
    assert Path("own", name).read_bytes() != Path("three", name).read_bytes()
    plain, of_recipe = read_settings([str(model)]), read_settings([str(model), "--recipe", "sd35m-ocr"])
    assert (plain.shift, plain.resolution) == (None, None)
    assert (of_recipe.shift, of_recipe.resolution) == (3.0, 512)
    of_the_recipes_model = read_settings([SD35_MEDIUM])
    assert (of_the_recipes_model.shift, of_the_recipes_model.resolution) == (3.0, 512)


def test_a_run_keeps_its_shift_though_the_models_file_changes(model: Path, workspace: Path) -> None:
    train(["small.yaml", "--model", str(model), "--iterations", "1"])
    edit(model / "scheduler/scheduler_config.json", shift=5.0)
    assert read_yaml(Path("runs/run/config.yaml"))["rollout"]["shift"] == 3.0
    resumed = read_start(["--resume", "runs/run", "--iterations", "2"])
    assert resumed.config.rollout.shift == 3.0


def test_random_weights_have_the_models_own_scheduler(model: Path) -> None:
    edit(model / "scheduler/scheduler_config.json", shift=5.0)
    made = make_random_pipeline(family_in(model), device=torch.device("cpu"), dtype=torch.float32, seed=0)
    assert made.scheduler.config.shift == 5.0
