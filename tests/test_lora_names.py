"""LoRAs in the names of other trainers, held against a merge by hand into the original model's fused weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dgpo_fast.errors import UserError
from dgpo_fast.models.families.sd3 import SD3
from dgpo_fast.models.families.sd3_lora_names import BLOCK, OUTSIDE
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.lora import find_lora, merge_lora
from dgpo_fast.models.lora_names import Target

Tensors = dict[str, torch.Tensor]


def loaded(folder: Path) -> StableDiffusion3Pipeline:
    return load_pipeline(str(folder), revision=None, device=torch.device("cpu"), dtype=torch.float32)


def original_checkpoint(transformer: SD3Transformer2DModel) -> Tensors:
    """Random weights under every original name and in its shape, of a model of this size."""
    own = transformer.state_dict()
    blocks = range(len(transformer.transformer_blocks))
    layers = {
        f"joint_blocks.{n}.{name}": [f"transformer_blocks.{n}.{one}" for one in BLOCK[name]]
        for n in blocks
        for name in BLOCK
    }
    layers |= {name: [layer] for name, layer in OUTSIDE.items()} | {"context_embedder": ["context_embedder"]}
    found = {"pos_embed": own["pos_embed.pos_embed"]}
    for name, targets in layers.items():
        if all(f"{target}.weight" in own for target in targets):
            for what in ("weight", "bias"):
                found[f"{name}.{what}"] = torch.randn_like(torch.cat([own[f"{target}.{what}"] for target in targets]))
    for n in blocks:
        for block, attention in (("x_block", "attn"), ("context_block", "attn"), ("x_block", "attn2")):
            for norm in ("ln_q", "ln_k") if f"joint_blocks.{n}.{block}.{attention}.qkv.weight" in found else ():
                found[f"joint_blocks.{n}.{block}.{attention}.{norm}.weight"] = torch.randn(16)
    return found


def kohya(layer: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    stem = "lora_unet_" + layer.replace(".", "_")
    return {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(3.0)}


def dotted(prefix: str, ends: tuple[str, str]) -> Callable[[str, torch.Tensor, torch.Tensor], Tensors]:
    def name(layer: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
        alpha = {f"{prefix}{layer}.alpha": torch.tensor([3.0])}
        return {f"{prefix}{layer}.{ends[0]}": a, f"{prefix}{layer}.{ends[1]}": b, **alpha}

    return name


def one_trainer(layer: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    """Query, key and value by themselves, each with factors of its own."""
    parts = b.chunk(3) if layer.endswith("qkv") else [b]
    stems = [f"transformer.{layer}.{n}" for n in range(3)] if layer.endswith("qkv") else [f"transformer.{layer}"]
    named: Tensors = {}
    for stem, part in zip(stems, parts, strict=True):
        named |= {f"{stem}.lora_down.weight": a.clone(), f"{stem}.lora_up.weight": part.contiguous()}
        named[f"{stem}.alpha"] = torch.tensor(3.0)
    return named


NAMINGS = {
    "OneTrainer": one_trainer,
    "kohya": kohya,
    "comfy": dotted("diffusion_model.", ("lora_A.weight", "lora_B.weight")),
    "original": dotted("", ("lora_down.weight", "lora_up.weight")),
    "wrapped": dotted("base_model.model.model.diffusion_model.", ("lora_A.default.weight", "lora_B.default.weight")),
}


class Renamed(SD3):
    """A family of one's own, of whose layers other trainers call one otherwise."""

    lora_names: ClassVar = {"last.layer": Target(("proj_out",))}


def test_a_family_says_what_other_trainers_call_its_layers(random_pipeline: Path, tmp_path: Path) -> None:
    file, own = tmp_path / "own.safetensors", f"{__name__}:Renamed"
    pipeline = load_pipeline(
        str(random_pipeline), revision=None, device=torch.device("cpu"), dtype=torch.float32, family=own
    )
    weight = pipeline.transformer.proj_out.weight
    before, a, b = weight.clone(), torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
    save_file(NAMINGS["comfy"]("last.layer", a, b), file)
    merge_lora(pipeline, file)
    torch.testing.assert_close(weight, before + 1.5 * b @ a)


@pytest.mark.parametrize("naming", NAMINGS)
def test_fused_original_layers_are_merged_as_by_hand(naming: str, random_pipeline: Path, tmp_path: Path) -> None:
    """Every layer of the original model: W + alpha / rank · B·A there, then diffusers' own conversion."""
    torch.manual_seed(0)
    pipeline = loaded(random_pipeline)
    checkpoint = original_checkpoint(pipeline.transformer)
    pipeline.transformer.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(checkpoint)))
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    factors: Tensors = {}
    for name, weight in checkpoint.items():
        if name.endswith(".weight") and weight.dim() > 1:
            a = torch.randn(6, *weight.shape[1:])
            b = torch.randn(len(weight), 6, *[1] * (weight.dim() - 2))
            factors |= NAMINGS[naming](name.removesuffix(".weight"), a, b)
            checkpoint[name] = weight + 3.0 / 6 * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    save_file(factors, tmp_path / "lora.safetensors")
    merge_lora(pipeline, tmp_path / "lora.safetensors")
    expected = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    found = pipeline.transformer.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
    changed = {name for name, weight in found.items() if not torch.equal(weight, before[name])}
    layers = {n for n, m in pipeline.transformer.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert changed == {f"{layer}.weight" for layer in layers}


@pytest.mark.parametrize(
    "prefix",
    ["lora_transformer.", "transformer.", "diffusion_model.", "base_model.model.transformer.", "base_model.model.", ""],
)
def test_prefixes_before_the_names_of_diffusers(prefix: str, random_pipeline: Path, tmp_path: Path) -> None:
    pipeline = loaded(random_pipeline)
    layer = "transformer_blocks.1.attn.add_q_proj"
    before = pipeline.transformer.get_parameter(f"{layer}.weight").clone()
    a, b = torch.randn(3, before.shape[1]), torch.randn(len(before), 3)
    save_file({f"{prefix}{layer}.lora_A.weight": a, f"{prefix}{layer}.lora_B.weight": b}, tmp_path / "x.safetensors")
    merge_lora(pipeline, find_lora(tmp_path))
    torch.testing.assert_close(pipeline.transformer.get_parameter(f"{layer}.weight"), before + b @ a)


TEXT_LAYERS = {
    # in kohya's scripts: part of the pipeline, layer
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
        "text_encoder",
        "text_model.encoder.layers.0.self_attn.q_proj",
    ),
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": ("text_encoder_2", "text_model.encoder.layers.1.mlp.fc1"),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q"),
    "t5.encoder.block.0.layer.1.DenseReluDense.wo": ("text_encoder_3", "encoder.block.0.layer.1.DenseReluDense.wo"),
    "clip_l.text_model.encoder.layers.1.mlp.fc1": ("text_encoder", "text_model.encoder.layers.1.mlp.fc1"),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc2"),
}


@pytest.mark.parametrize("name", TEXT_LAYERS)
def test_factors_of_text_encoders(name: str, random_pipeline: Path, tmp_path: Path) -> None:
    pipeline, (part, layer) = loaded(random_pipeline), TEXT_LAYERS[name]
    weight = getattr(pipeline, part).get_parameter(f"{layer}.weight")
    before, a, b = weight.clone(), torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
    save_file({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, tmp_path / "x.safetensors")
    merge_lora(pipeline, find_lora(tmp_path))
    torch.testing.assert_close(weight, before + b @ a)


PATTERNS = LoraConfig(
    r=2,
    lora_alpha=6,
    target_modules=["attn.to_q", "attn.to_v"],
    rank_pattern={"attn.to_v": 4},
    alpha_pattern={"transformer_blocks.1.attn.to_v": 1},
    use_rslora=True,
    init_lora_weights=False,
)
"""Ranks and alphas by layer."""


def by_diffusers(folder: Path, random_pipeline: Path) -> Tensors:
    """Saves a LoRA with its settings in the file's header; the weights after plain diffusers has fused it."""
    trained, theirs = loaded(random_pipeline), loaded(random_pipeline)
    trained.transformer.add_adapter(PATTERNS)
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        get_peft_model_state_dict(trained.transformer, adapter_name="default"),
        transformer_lora_adapter_metadata=trained.transformer.peft_config["default"].to_dict(),
    )
    theirs.load_lora_weights(folder)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    return theirs.transformer.state_dict()


def by_peft(folder: Path, random_pipeline: Path) -> Tensors:
    """Saves a LoRA as PEFT does; the weights after PEFT has merged it."""
    model = get_peft_model(loaded(random_pipeline).transformer, PATTERNS)
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("library", [by_diffusers, by_peft])
def test_what_a_library_saves_is_merged_as_it_merges_it(
    library: Callable, random_pipeline: Path, tmp_path: Path
) -> None:
    expected, ours = library(tmp_path, random_pipeline), loaded(random_pipeline)
    before = {name: weight.clone() for name, weight in ours.transformer.state_dict().items()}
    merge_lora(ours, find_lora(tmp_path))
    for name, weight in ours.transformer.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(weight, before[name]) != name.endswith((".attn.to_q.weight", ".attn.to_v.weight"))


LAYER = "transformer.transformer_blocks.0.attn.to_q"
A, B = torch.ones(2, 32), torch.ones(32, 2)
PLAIN = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}
REFUSED = {
    # what the line says: what is in the file
    "is of a DoRA (": {**PLAIN, f"{LAYER}.dora_scale": torch.ones(32)},
    "is of a DoRA (transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": {
        **PLAIN,
        f"{LAYER}.lora_magnitude_vector": torch.ones(32),
    },
    "is of a LoKr (": {f"lycoris_{LAYER}.lokr_w1": torch.ones(2, 2)},
    "is of a LoHa (": {f"{LAYER}.hada_w1_a": torch.ones(2, 2)},
    "is of a LoCon with Tucker factors (": {**PLAIN, f"{LAYER}.lora_mid.weight": torch.ones(2, 2)},
    f"{LAYER}.lora_B.bias is no factor of a LoRA": {**PLAIN, f"{LAYER}.lora_B.bias": torch.ones(32)},
    f"{LAYER}.diff is no factor of a LoRA": {**PLAIN, f"{LAYER}.diff": torch.ones(32, 32)},
    "it has no layer lora_te_text_model_encoder_layers_0_mlp_fc1": {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A,
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": B,
    },
    "transformer_blocks.0.attn.to_q is 32 × 32 there, and 64 × 32 in the LoRA": {
        **PLAIN,
        f"{LAYER}.lora_B.weight": torch.ones(64, 2),
    },
    "of transformer_blocks.0.attn.to_q, one of the two factors is missing": {f"{LAYER}.lora_A.weight": A},
    "the factors of transformer_blocks.0.attn.to_q have ranks 2 and 3": {
        **PLAIN,
        f"{LAYER}.lora_B.weight": torch.ones(32, 3),
    },
    "the factors of transformer_blocks.0.attn.to_q are no matrices": {
        **PLAIN,
        f"{LAYER}.lora_A.weight": torch.ones(32),
    },
    "transformer_blocks.0.attn.to_q has two pairs of factors": {
        **PLAIN,
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": A.clone(),
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.ones(96, 2),
    },
    "nothing is in it": {},
    "has numbers that are not finite, in ": {**PLAIN, f"{LAYER}.alpha": torch.tensor(float("inf"))},
}


@pytest.fixture(scope="module")
def unchanged(random_pipeline: Path) -> StableDiffusion3Pipeline:
    """A pipeline for tests that leave it as it is."""
    return loaded(random_pipeline)


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_no_lora_for_the_model_is_named(line: str, unchanged: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    pipeline = unchanged
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    save_file(REFUSED[line], tmp_path / "x.safetensors")
    with pytest.raises(UserError) as caught:
        merge_lora(pipeline, find_lora(tmp_path))
    assert str(caught.value).startswith(f"LoRA '{tmp_path / 'x.safetensors'}'") and line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(weight.equal(before[name]) for name, weight in pipeline.transformer.state_dict().items())


def test_a_lora_that_goes_with_other_base_weights_is_refused(random_pipeline: Path, tmp_path: Path) -> None:
    """PEFT's PiSSA takes what it trains out of the model's weights; its factors alone say nothing."""
    model = get_peft_model(
        loaded(random_pipeline).transformer, LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights="pissa")
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"adapter_config.json: init_lora_weights pissa has changed the model's weights"
    ):
        merge_lora(loaded(random_pipeline), find_lora(tmp_path))


def test_damaged_settings_are_named(unchanged: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "adapter_model.safetensors")
    for config in ({"lora_alpha": "much"}, {"lora_alpha": [1]}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        with pytest.raises(UserError, match="cannot be loaded into this model"):
            merge_lora(unchanged, find_lora(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    save_file(PLAIN, tmp_path / "adapter_model.safetensors", metadata={"lora_adapter_metadata": "[1"})
    with pytest.raises(UserError, match="the settings in its header are damaged"):
        merge_lora(unchanged, find_lora(tmp_path))


def test_eight_bit_factors(random_pipeline: Path, tmp_path: Path) -> None:
    """Stored in float8, as small files are."""
    pipeline = loaded(random_pipeline)
    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    before = weight.clone()
    save_file({name: factor.to(torch.float8_e4m3fn) for name, factor in PLAIN.items()}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")
    merge_lora(pipeline, find_lora(tmp_path))
    torch.testing.assert_close(weight, before + B @ A)
