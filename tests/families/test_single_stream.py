"""Z-Image and Lumina2: gradients, recordings, saved LoRAs, sizes. Their forward is written anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from dgpo_fast.engine.recorded import RecordedRollouts
from dgpo_fast.errors import UserError
from dgpo_fast.models.families import known_models, make_family
from dgpo_fast.models.family import Family, Rows, attach, even_sigmas
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import sample_latents
from dgpo_fast.rollout.schedule import make_schedule
from tests.engine.tape import TapeRecorder
from tests.families import lumina2, z_image
from tests.families.case import Case
from tests.families.test_pictures import PROMPTS, condition, draw, noise_of, relative

OF = {case.name: case for case in (z_image.CASE, lumina2.CASE)}


@pytest.fixture(params=OF.values(), ids=OF)
def of(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Case, Any, Family]:
    """A case, its pipeline and its family."""
    pipeline = request.param.make()
    return request.param, pipeline, request.param.family_of(pipeline, tmp_path / "saved")


def with_lora(pipeline: Any, family: Family, alpha: int = 8) -> Any:
    """The pipeline's transformer with a random LoRA."""
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=list(family.lora_targets)))
    generator = torch.Generator().manual_seed(11)
    for parameter in adapters(transformer).values():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return transformer


def adapters(transformer: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in transformer.named_parameters() if "lora_" in name}


def plain_velocity(name: str, transformer: Any, x: Tensor, timestep: Tensor, rows: list[Rows]) -> Tensor:
    """ε − x0 by diffusers' own forward, which takes captions as they are."""
    texts = [row["text"] for row in rows]
    if name == "z_image":
        return -torch.stack(transformer(list(x[:, :, None]), 1 - timestep / 1000, texts, return_dict=False)[0])[:, :, 0]
    text = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.tensor([[place < len(own) for place in range(text.shape[1])] for own in texts])
    return -transformer(x, 1 - timestep / 1000, text, mask, return_dict=False)[0]


def test_the_gradient_is_that_of_diffusers_own_forward(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    transformer = with_lora(pipeline, family)
    rows = [family.encode(pipeline, text, case.length, negative=False) for text in PROMPTS]
    x, timestep = noise_of(family, case.size, 2), torch.tensor([900.0, 300.0])
    wanted = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    gradients = []
    for velocity in (
        family.velocity(transformer, x, timestep, family.stack(rows, 0), None),
        plain_velocity(case.name, transformer, x, timestep, rows),
    ):
        loss = ((velocity - wanted) ** 2).mean()
        gradients.append(
            dict(
                zip(adapters(transformer), torch.autograd.grad(loss, list(adapters(transformer).values())), strict=True)
            )
        )
    ours, plain = gradients
    assert len(ours) == 2 * 6 * len(family.lora_targets)
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        # In fp32, whose rounding of the smallest gradients depends on the processor; a wrong term shows a thousandfold.
        assert relative(gradient, plain[name]) < 1e-3, name


def test_padding_to_a_longer_length_changes_nothing(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    rows = [family.encode(pipeline, text, case.length, negative=False) for text in PROMPTS]
    x, timestep = noise_of(family, case.size, 2), torch.tensor([900.0, 300.0])
    with torch.no_grad():
        short, long = (
            family.velocity(pipeline.transformer, x, timestep, family.stack(rows, n), None) for n in (0, 320)
        )
    assert relative(long, short) < 1e-6


def test_the_transformers_own_forward_stays_and_its_hooks_are_called(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    seen: list[int] = []
    pipeline.transformer.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    family.velocity(
        pipeline.transformer, noise_of(family, case.size), torch.tensor([500.0]), one(family, pipeline), None
    )
    assert seen == [1]
    assert "forward" not in vars(pipeline.transformer)


def one(family: Family, pipeline: Any) -> Rows:
    return condition(family, pipeline, PROMPTS[:1], 288)


@torch.no_grad()
def test_a_recorded_rollout_serves_all_prompts_of_a_length(of: tuple[Case, Any, Family]) -> None:
    """By a recorder that is stricter than CUDA graphs; guided, and the last batch is partial."""
    case, pipeline, family = of
    transformer = attach(pipeline.transformer, family)
    draw = Draw(make_schedule("euler", 2, 6.0, sigmas=even_sigmas(2)), family.guidance(case.scales["guided"]), 3)
    recorder = TapeRecorder()
    recorded = RecordedRollouts(recorder)
    for texts in (["a cat", PROMPTS[1], "a"], ["b" * 40, "a dog"]):
        encoded = [family.encode(pipeline, text, case.length, negative=False) for text in texts]
        encoded.append(family.encode(pipeline, "", case.length, negative=True))
        index = torch.arange(len(texts))
        text = TextEmbeds(family.stack(encoded, 288), index, torch.full_like(index, len(texts)))
        noise = noise_of(family, case.size, len(texts))
        found, plain = (solve(transformer, noise, text, draw) for solve in (recorded, sample_latents))
        assert relative(found, plain) < 1e-5
    assert len(recorder.tapes) == 1


def test_a_saved_lora_draws_the_same_in_plain_diffusers(of: tuple[Case, Any, Family], tmp_path: Path) -> None:
    case, pipeline, family = of
    noise, scale = noise_of(family, case.size), case.scales["guided"]
    base, _ = case.pipeline_draws(pipeline, noise, PROMPTS[0], "", scale, 4)
    transformer = with_lora(pipeline, family, alpha=4)  # alpha = r: the form that every reader understands
    ours, _ = draw(family, pipeline, noise, PROMPTS[:1], "", scale, 4, case)
    family.pipeline_class.save_lora_weights(  # type: ignore[attr-defined]
        tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(transformer)
    )
    plain = z_image.quiet(family.pipeline_class.from_pretrained(tmp_path / "saved"))  # type: ignore[attr-defined]
    plain.load_lora_weights(tmp_path / "lora")
    theirs, _ = case.pipeline_draws(plain, noise, PROMPTS[0], "", scale, 4)
    assert relative(ours, theirs) < 1e-5
    assert relative(base, theirs) > 1e-2


def test_captions_end_where_the_transformers_positions_end(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    longest = {"z_image": 992, "lumina2": 299}[case.name]
    given, x = family.stack([family.random_condition("a", longest)], 0), noise_of(family, case.size)
    v = family.velocity(pipeline.transformer, x, torch.tensor([500.0]), given, None)
    assert v.isfinite().all()
    family.check_length(longest)
    with pytest.raises(UserError, match=f"positions for {longest} tokens; use --rollout.max-sequence-length {longest}"):
        family.check_length(longest + 1)
    with pytest.raises(UserError, match="max_sequence_length 0: this model's text encoder needs tokens"):
        family.random_condition("a", 0)


def test_guidance_is_the_number_on_the_models_card(tmp_path: Path) -> None:
    families = {name: case.family_of(case.make(), tmp_path / name) for name, case in OF.items()}
    conditional, negative = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    z, lumina = families["z_image"], families["lumina2"]
    assert torch.equal(z.guidance(2.0).combine(conditional, negative), conditional + 2 * (conditional - negative))
    assert z.guidance(0.5).pairs
    assert not z.guidance(0.0).pairs
    guided = lumina.guidance(2.0).combine(conditional, negative)
    assert torch.allclose(guided.norm(dim=-1), conditional.norm(dim=-1))
    assert torch.allclose(guided / guided[..., :1], (2 * conditional - negative) / 6)
    assert not lumina.guidance(1.0).pairs


@pytest.mark.parametrize(
    ("folder", "shift", "distilled"), [("base", 6.0, False), ("base", 3.0, True), ("Z-Turbo", 6.0, True)]
)
def test_turbo_is_known_by_its_name_or_its_shift(tmp_path: Path, folder: str, shift: float, distilled: bool) -> None:
    family = z_image.CASE.family_of(z_image.make(shift), tmp_path / folder)
    assert family.distilled == distilled
    assert len(family.notes) == distilled


@pytest.mark.parametrize(
    ("model", "transformer", "encoder"),
    [
        ("Tongyi-MAI/Z-Image", 6.15, 4.02),
        ("Tongyi-MAI/Z-Image-Turbo", 6.15, 4.02),
        ("Alpha-VLLM/Lumina-Image-2.0", 2.61, 2.61),
    ],
)
def test_published_sizes(model: str, transformer: float, encoder: float) -> None:
    family = make_family(known_models()[model]())
    with torch.device("meta"):
        parts = family.build_transformer(), family.architecture.build_text_encoder("text_encoder"), family.build_vae()
    billions = [sum(weight.numel() for weight in part.parameters()) / 1e9 for part in parts]
    assert billions == pytest.approx([transformer, encoder, 0.0838], abs=0.005)
    assert family.distilled == model.endswith("Turbo")
    assert family.size == (1024, 1024)
