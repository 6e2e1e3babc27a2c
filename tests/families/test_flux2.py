"""What is FLUX.2's alone: the cut text encoder, the layers and the file of a LoRA, sizes and shifts."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from dgpo_fast.errors import UserError
from dgpo_fast.models.families import known_models, make_family
from dgpo_fast.models.family import Family, even_sigmas
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.lora import Factors, write_lora
from dgpo_fast.models.policy import ADAPTER
from dgpo_fast.models.prompt_encoder import PromptEncoder
from tests.families.case import Case
from tests.families.flux2 import CASES, DEV, KLEIN, KLEIN_DISTILLED
from tests.families.test_gradients import with_lora
from tests.families.test_pictures import PROMPTS, condition, noise_of, relative

CPU = torch.device("cpu")
Made = tuple[Case, Any, Family]


@pytest.fixture(scope="module", params=(KLEIN, DEV), ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The case, its pipeline and its family."""
    pipeline = request.param.make()
    return request.param, pipeline, request.param.family_of(pipeline, tmp_path_factory.mktemp(request.param.name))


def test_encoding_leaves_the_text_encoder_whole_and_runs_no_layer_after_the_last_that_is_read(made: Made) -> None:
    _, pipeline, family = made
    layers, state = pipeline.text_encoder.get_decoder().layers, pipeline.text_encoder.state_dict()
    ran: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)]
    found = family.encode(pipeline, PROMPTS[0], 512, negative=False)["text"]
    for hook in hooks:
        hook.remove()
    assert ran == list(range(family.text_layers[-1])) != list(range(len(layers)))
    assert pipeline.text_encoder.state_dict().keys() == state.keys()
    expected, _ = pipeline.encode_prompt(PROMPTS[0])
    assert torch.equal(found, expected[0])  # and so later callers have all layers, with the norm


@pytest.mark.parametrize("made", (KLEIN,), ids=lambda case: case.name, indirect=True)
def test_the_negative_prompt_of_klein_is_the_empty_one(made: Made) -> None:
    _, pipeline, family = made
    negative = family.encode(pipeline, "a blurred photo", 512, negative=True)["text"]
    assert torch.equal(negative, family.encode(pipeline, "", 512, negative=False)["text"])
    assert any("negative" in note for note in family.notes)


@pytest.mark.parametrize("made", (DEV,), ids=lambda case: case.name, indirect=True)
def test_marks_of_pictures_are_no_part_of_a_prompt_of_dev(made: Made) -> None:
    _, pipeline, family = made
    found, plain = (family.encode(pipeline, text, 512, negative=False)["text"] for text in ("a [IMG]cat", "a cat"))
    assert torch.equal(found, plain)


def test_the_pipelines_index_tells_a_distilled_model(tmp_path: Path) -> None:
    found = {case.name: case.family_of(case.make(), tmp_path / case.name) for case in CASES}
    assert [found[case.name].distilled for case in (KLEIN, KLEIN_DISTILLED, DEV)] == [False, True, False]
    assert not found[KLEIN_DISTILLED.name].guidance(4.0).pairs
    assert found[KLEIN.name].guidance(4.0).pairs
    assert found[DEV.name].guidance(4.0).embedded == 4.0


def test_encoded_pixels_are_what_the_pipeline_makes_of_a_picture(made: Made) -> None:
    case, pipeline, family = made
    pixels = torch.rand(1, 3, *case.size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    found = family.encode_pixels(pipeline.vae, pixels)
    assert relative(found, pipeline._encode_vae_image(pixels, torch.Generator())) < 1e-6


def test_lora_targets_are_every_linear_layer_of_both_kinds_of_blocks(made: Made) -> None:
    _, pipeline, family = made
    names = [name for name, module in pipeline.transformer.named_modules() if isinstance(module, nn.Linear)]
    hit = {name for name in names if re.fullmatch(family.lora_targets, name)}
    assert hit == {name for name in names if "blocks." in name}
    assert len(hit) == 2 * 12 + 2 * 2


@torch.no_grad()
def test_plain_diffusers_reads_a_lora_whose_scale_is_in_its_factors(made: Made, tmp_path: Path) -> None:
    case, base, family = made
    trained, fresh = case.make(), case.make()
    trained.transformer = with_lora(base.transformer, family.lora_targets)
    layers = {name: part for name, part in trained.transformer.named_modules() if isinstance(part, LoraLayer)}
    factors = {
        name: Factors(part.lora_A[ADAPTER].weight, part.lora_B[ADAPTER].weight * part.scaling[ADAPTER])
        for name, part in layers.items()
    }
    write_lora(tmp_path, factors, trained.transformer.peft_config[ADAPTER].to_dict(), family)
    fresh.load_lora_weights(tmp_path)
    read = {name for name, part in fresh.transformer.named_modules() if isinstance(part, LoraLayer)}
    assert read == layers.keys()
    assert {name.split(".")[0] for name in read} == {"transformer_blocks", "single_transformer_blocks"}
    noise = noise_of(family, case.size)
    drawn = [case.pipeline_draws(p, noise, PROMPTS[0], "", 4.0, 4)[0] for p in (fresh, trained, base)]
    assert relative(drawn[0], drawn[1]) < 1e-5
    assert relative(drawn[0], drawn[2]) > 1e-2


def test_layers_that_no_prompt_is_read_from_are_not_kept(made: Made, tmp_path: Path) -> None:
    """A saved pipeline has them again."""
    case, pipeline, family = made
    folder = Path(family.architecture.folder)  # type: ignore[arg-type]
    loaded = load_pipeline(str(folder), revision=None, device=CPU, dtype=torch.float32, with_text=False)
    encoder = PromptEncoder(loaded, case.length)
    found = encoder(PROMPTS).gathered()["text"]
    expected = condition(family, pipeline, PROMPTS, case.length)["text"]
    assert torch.equal(found, expected)
    kept, whole = (len(of.text_encoder.get_decoder().layers) for of in (encoder.encoders, pipeline))
    assert kept == family.text_layers[-1] < whole
    encoder.whole_pipeline().save_pretrained(tmp_path / "saved")
    ours, theirs = (where / "text_encoder/model.safetensors" for where in (tmp_path / "saved", folder))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed: no part lacks it")
def test_a_part_that_needs_a_package_is_one_line(tmp_path: Path) -> None:
    """The published dev's processor of pictures needs torchvision."""
    DEV.make().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", "PixtralProcessor"]}))
    why = (
        "cannot be loaded: PixtralProcessor requires the Torchvision library but it was not found in your environment$"
    )
    with pytest.raises(UserError, match=f"^model '{tmp_path}' {why}"):
        load_pipeline(str(tmp_path), revision=None, device=CPU, dtype=torch.float32)
    pipeline = load_pipeline(str(tmp_path), revision=None, device=CPU, dtype=torch.float32, with_text=False)
    with pytest.raises(UserError, match=f"^the text encoders in {tmp_path} {why}"):
        PromptEncoder(pipeline, 512)(["a cat"])


SIZES = {
    "klein-base-4B": (3.88, 4.02, 96, 100),
    "klein-4B": (3.88, 4.02, 96, 100),
    "klein-base-9B": (9.08, 8.19, 174, 144),
    "klein-9B": (9.08, 8.19, 174, 144),
    "dev": (32.22, 24.01, 403, 192),
}
"""By the name on the hub: weights of the transformer and of the text encoder in 10⁹; of a LoRA of rank 64 in 10⁶, and
its layers."""


@pytest.mark.parametrize("name", SIZES)
def test_published_models_have_their_numbers_of_weights(name: str) -> None:
    transformer, encoder, lora, layers = SIZES[name]
    architecture = known_models()[f"black-forest-labs/FLUX.2-{name}"]()
    family = make_family(architecture)
    with torch.device("meta"):
        model, vae = family.build_transformer(), family.build_vae()
        text = architecture.build_text_encoder("text_encoder")
    assert round(weights(model) / 1e9, 2) == transformer
    assert round(weights(text) / 1e9, 2) == encoder
    assert round(weights(vae) / 1e6, 1) == 84.0
    hit = [part for part_name, part in model.named_modules() if re.fullmatch(family.lora_targets, part_name)]
    assert len(hit) == layers
    assert round(64 * sum(layer.in_features + layer.out_features for layer in hit) / 1e6) == lora
    assert family.distilled == (name in ("klein-4B", "klein-9B"))
    assert family.size == (1024, 1024)
    assert family.latent_shape(1024, 768) == (128, 64, 48)


def weights(module: nn.Module) -> int:
    """Numbers of all parameters, each tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("side", "steps", "shift"), [(512, 4, 7.62), (512, 28, 6.42), (512, 50, 5.48), (1024, 10, 9.55), (1024, 50, 7.56)]
)
def test_the_shift_depends_on_the_picture_and_on_the_steps(side: int, steps: int, shift: float) -> None:
    family = make_family(known_models()["black-forest-labs/FLUX.2-klein-base-4B"]())
    grid = family.grid(steps, family.latent_shape(side, side))
    assert grid.sigmas == even_sigmas(steps)
    assert round(grid.shift, 2) == shift
