"""What Qwen-Image and SANA have in common, texts of several lengths behind a mask, and what is one's alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dgpo_fast.models.families import known_models, make_family
from dgpo_fast.models.family import Family, Rows
from tests.families.case import Case
from tests.families.qwen_image import CASE as QWEN_IMAGE
from tests.families.sana import CASE as SANA
from tests.families.test_pictures import BUDGET, PROMPTS, condition, draw, noise_of, relative

Made = tuple[Case, Any, Family]
RANK, ALPHA = 4, 8.0
TIMES = torch.tensor([300.0, 800.0])


def make(case: Case, folder: Path) -> Made:
    """The case, its pipeline and its family."""
    pipeline = case.make()
    return case, pipeline, case.family_of(pipeline, folder)


@pytest.fixture(scope="module", params=(QWEN_IMAGE, SANA), ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(request.param, tmp_path_factory.mktemp(request.param.name))


@torch.no_grad()
def test_neither_more_padding_nor_what_is_in_it_changes_a_velocity(made: Made) -> None:
    case, pipeline, family = made
    rows = [family.encode(pipeline, text, case.length, negative=False) for text in PROMPTS]
    longest = max(map(family.text_tokens, rows))
    noise = noise_of(family, case.size, 2)

    def velocity(given: Rows) -> Tensor:
        return family.velocity(pipeline.transformer, noise, TIMES, given, None)

    plain = family.stack(rows, longest)
    assert plain["mask"].sum(1).tolist() == [family.text_tokens(row) for row in rows]
    expected = velocity(plain)
    assert relative(velocity(family.stack(rows, longest + 64)), expected) < 1e-5
    noisy = torch.where(plain["mask"][:, :, None], plain["text"], torch.randn_like(plain["text"]))
    assert not torch.equal(noisy, plain["text"])
    assert relative(velocity({**plain, "text": noisy}), expected) < 1e-6
    assert relative(velocity({**plain, "mask": torch.ones_like(plain["mask"])}), expected) > 1e-3


def test_the_mask_is_there_even_if_nothing_is_padded(made: Made) -> None:
    _, _, family = made
    row = family.random_condition("a", 64)
    stacked = family.stack([row, row], 0)
    assert stacked["mask"].all()
    assert {name: tuple(t.shape) for name, t in stacked.items()} == {
        name: tuple(t.shape) for name, t in family.stack([row, row], 64).items()
    }


def test_a_text_longer_than_its_padding_is_refused(made: Made) -> None:
    _, _, family = made
    with pytest.raises(RuntimeError, match="size"):
        family.stack([family.random_condition("a", 65)], 64)


def plain_qwen_image(pipeline: Any, x: Tensor, given: Rows) -> Tensor:
    """Velocities as diffusers' pipeline has them, (B, C, H, W)."""
    batch, channels, height, width = x.shape
    out = pipeline.transformer(
        hidden_states=pipeline._pack_latents(x, batch, channels, height, width),
        timestep=TIMES / 1000,
        encoder_hidden_states=given["text"],
        encoder_hidden_states_mask=given["mask"].long(),
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(out, height, width, 1)[:, :, 0]


def plain_sana(pipeline: Any, x: Tensor, given: Rows) -> Tensor:
    """As `plain_qwen_image`."""
    out = pipeline.transformer(
        x,
        encoder_hidden_states=given["text"],
        encoder_attention_mask=given["mask"].long(),
        timestep=TIMES * pipeline.transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return out.chunk(2, dim=1)[0]


PLAIN: dict[str, Callable[[Any, Tensor, Rows], Tensor]] = {"qwen_image": plain_qwen_image, "sana": plain_sana}


def with_random_lora(pipeline: Any, family: Family) -> dict[str, nn.Parameter]:
    """Puts a LoRA into the pipeline's transformer, none of whose factors is 0; gives the factors."""
    generator = torch.Generator().manual_seed(5)
    pipeline.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(family.lora_targets)))
    factors = {name: weight for name, weight in pipeline.transformer.named_parameters() if "lora_" in name}
    for factor in factors.values():
        factor.data.normal_(0, 0.3, generator=generator)
    return factors


def test_each_lora_target_names_layers_of_every_block(made: Made) -> None:
    _, pipeline, family = made
    names = [name for name, module in pipeline.transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in family.lora_targets:
        hit = [name for name in names if name.endswith(f".{target}")]
        assert [name.split(".")[:2] for name in hit] == [["transformer_blocks", str(n)] for n in range(3)], target


def test_gradients_of_a_lora_are_those_of_plain_autograd_through_diffusers_transformer(made: Made) -> None:
    case, _, family = made
    pipeline = case.make()
    factors = with_random_lora(pipeline, family)
    given = condition(family, pipeline, PROMPTS, case.length)
    x, target = noise_of(family, case.size, 4).split(2)
    velocities = family.velocity(pipeline.transformer, x, TIMES, given, None), PLAIN[case.name](pipeline, x, given)
    found, expected = (
        torch.autograd.grad((v - target).square().mean(), list(factors.values()), allow_unused=True) for v in velocities
    )
    for name, ours, theirs in zip(factors, found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs.abs().max() > 0:
            assert relative(ours, theirs) < 1e-5, name
    # Nothing reads the text tokens behind Qwen-Image's last block.
    idle = {name.split(".lora_")[0] for name, ours in zip(factors, found, strict=True) if ours is None}
    last = {f"transformer_blocks.2.{name}" for name in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
    assert idle == (last if case is QWEN_IMAGE else set())


@torch.no_grad()
def test_plain_diffusers_reads_a_lora_whose_scale_is_in_its_factors(made: Made, tmp_path: Path) -> None:
    case, base, family = made
    trained = case.make()
    factors = with_random_lora(trained, family)
    layers = {name.replace(".default", ""): tensor.detach() for name, tensor in factors.items()}
    folded = {name: t * ALPHA / RANK if "lora_B" in name else t for name, t in layers.items()}
    family.pipeline_class.save_lora_weights(tmp_path, transformer_lora_layers=folded)  # type: ignore[attr-defined]
    written = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(written) == {f"transformer.{name}" for name in folded}
    fresh = case.make()
    fresh.load_lora_weights(tmp_path)
    noise = noise_of(family, case.size)
    drawn = [case.pipeline_draws(p, noise, PROMPTS[0], "", 4.0, 4)[0] for p in (fresh, trained, base)]
    assert relative(drawn[0], drawn[1]) < 1e-5
    assert relative(drawn[0], drawn[2]) > 1e-2


@torch.no_grad()
def test_encoded_pixels_are_the_autoencoders_with_its_statistics(made: Made) -> None:
    case, pipeline, family = made
    vae, config = pipeline.vae, pipeline.vae.config
    pixels = torch.rand(1, 3, *case.size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    if case is SANA:
        expected = vae.encode(pixels).latent * config.scaling_factor
    else:
        mean, std = (torch.tensor(per)[:, None, None] for per in (config.latents_mean, config.latents_std))
        expected = (vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2) - mean) / std
    assert relative(family.encode_pixels(vae, pixels), expected) < 1e-6


def test_blocks_of_a_kind_and_their_numbers(made: Made) -> None:
    _, _, family = made
    config, counts = family.one_of_each_block()
    assert counts == [1, 1, 1]
    assert config["num_layers"] == len(counts)


@pytest.mark.parametrize(
    ("name", "billions", "encoder", "autoencoder"),
    [
        ("Qwen/Qwen-Image", 20.43, 8.29, 126.9),
        ("Efficient-Large-Model/Sana_600M_512px_diffusers", 0.59, 2.61, 312.3),
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", 1.60, 2.61, 312.3),
        ("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", 4.72, 2.61, 312.3),
    ],
)
def test_published_models_have_their_sizes(name: str, billions: float, encoder: float, autoencoder: float) -> None:
    architecture = known_models()[name]()
    family = make_family(architecture)
    with torch.device("meta"):
        transformer, vae = family.build_transformer(), family.build_vae()
        text_encoder = architecture.build_text_encoder("text_encoder")
    assert round(count(transformer) / 1e9, 2) == billions
    assert round(count(text_encoder) / 1e9, 2) == encoder
    assert round(count(vae) / 1e6, 1) == autoencoder
    side = 512 if "512px" in name else 1024
    assert family.size == (side, side)
    latent = family.latent_shape(side, side)
    assert latent == ((32, side // 32, side // 32) if "Sana" in name or "SANA" in name else (16, 128, 128))
    assert family.multiple == (32 if latent[0] == 32 else 16)


def test_sana_on_eulers_scheduler_draws_what_its_pipeline_does(tmp_path: Path) -> None:
    pipeline = SANA.make()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    family, euler = SANA.family_of(pipeline, tmp_path), replace(SANA, solver="euler")
    noise = noise_of(family, SANA.size)
    for steps in SANA.steps:
        expected, _ = euler.pipeline_draws(pipeline, noise, PROMPTS[0], "", 4.0, steps)
        found, _ = draw(family, pipeline, noise, PROMPTS[:1], "", 4.0, steps, euler)
        assert relative(found, expected) < BUDGET, steps


def test_compiled_blocks_are_whole_graphs_and_other_prompts_add_none(made: Made) -> None:
    case, _, family = made
    transformer = case.make().transformer
    noise = noise_of(family, case.size, 2)

    def forward(lengths: tuple[int, int], times: Tensor) -> Tensor:
        rows = [family.random_condition(f"a prompt of {length}", length) for length in lengths]
        return family.velocity(transformer, noise, times, family.stack(rows, 64), None)

    with torch.no_grad():
        expected = forward((20, 64), TIMES)
        torch._dynamo.reset()
        counters["stats"].clear()
        for block in family.blocks(transformer):
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        assert relative(forward((20, 64), TIMES), expected) < 1e-6
        graphs = counters["stats"]["unique_graphs"]
        for lengths in ((1, 2), (64, 64), (33, 7)):
            forward(lengths, TIMES / 2)
    assert 0 < counters["stats"]["unique_graphs"] == graphs <= 3


def count(module: nn.Module) -> int:
    """Weights of `module`."""
    return sum(parameter.numel() for parameter in module.parameters())
