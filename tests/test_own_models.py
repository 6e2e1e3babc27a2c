"""Model folders and LoRAs that other people and other trainers wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dgpo_fast.config.options import Policy
from dgpo_fast.errors import UserError
from dgpo_fast.models.latents import decode_pixels
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.lora import find_lora, merge_lora
from dgpo_fast.models.policy import PolicyModels

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
        pixels.append(decode_pixels(loaded(model).vae, latents, torch.float32))
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
