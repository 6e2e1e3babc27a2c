"""What a run makes of what a family says: guidance, grids, LoRA targets, and models that it refuses."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Config, Policy
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.models.families import known_models, make_family
from dgpo_fast.models.families.sd3 import SD3
from dgpo_fast.models.family import Family, Grid, Guidance, Rows, attach, even_sigmas, family_of
from dgpo_fast.models.forward import predict
from dgpo_fast.models.loading import load_pipeline, read_model
from dgpo_fast.models.own_settings import in_plain_numbers
from dgpo_fast.models.policy import lora_targets, with_lora
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import initial_noise, sample_latents
from dgpo_fast.rollout.schedule import make_schedule
from dgpo_fast.train import train
from tests.sd3 import family_in, transformer_in

CPU = torch.device("cpu")
OWN = f"{__name__}:OnePlus"


class OnePlus(SD3):
    """Guided above 0, with a rule, a grid that depends on the steps, and a number that the transformer reads."""

    def guidance(self, scale: float) -> Guidance:
        return Guidance(1 + scale, embedded=scale, rule=halved)

    def grid(self, steps: int, latent: tuple[int, ...]) -> Grid:
        return Grid(1.0 + steps, even_sigmas(steps), last=0.05)

    def velocity(
        self, transformer: Any, x_t: Tensor, timestep: Tensor, condition: Rows, embedded: Tensor | None
    ) -> Tensor:
        assert embedded is not None and embedded.shape == timestep.shape == (len(x_t),)
        return super().velocity(transformer, x_t, timestep + embedded, condition, None)


def halved(guided: Tensor, conditional: Tensor) -> Tensor:
    return (guided + conditional) / 2


def test_a_rule_and_an_embedded_number_are_followed(random_pipeline: Path) -> None:
    """Against the loop written out; the shift is the family's for these steps."""
    pipeline = load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32, family=OWN)
    family, transformer = family_of(pipeline.transformer), pipeline.transformer
    text = PromptEncoder(pipeline, 9)(["a cat", "a dog"])
    guidance, grid = family.guidance(3.0), family.grid(4, (16, 8, 8))
    schedule = make_schedule("euler", 4, grid.shift, sigmas=grid.sigmas, last=grid.last)
    noise = initial_noise((16, 8, 8), torch.arange(2), seed=1, draw=0)
    found = sample_latents(transformer, noise, text, Draw(schedule, guidance, 2))
    x, read = noise, text.with_embedded(3.0)
    for step, timestep in enumerate(schedule.timesteps):
        with torch.no_grad():
            conditional, negative = (
                predict(transformer, x, timestep, read),
                predict(transformer, x, timestep, read.negative()),
            )
        v = halved(negative + 4.0 * (conditional - negative), conditional)
        x = x + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * v
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    assert float(schedule.sigmas[-2]) == pytest.approx(0.05)


def test_what_objectives_read_is_in_plain_numbers(random_pipeline: Path) -> None:
    config = configure(
        ["--model", str(random_pipeline), "--rollout.guidance-scale", "3", "--evaluation.guidance-scale", "0"]
    )
    own, sd3 = (
        in_plain_numbers(config, family_with(OnePlus, random_pipeline)),
        in_plain_numbers(config, family_in(random_pipeline)),
    )
    assert (own.rollout.guidance_scale, own.evaluation.guidance_scale) == (4.0, 1.0)
    assert own.rollout.shift == 1.0 + config.rollout.num_inference_steps
    assert (sd3.rollout.guidance_scale, sd3.evaluation.guidance_scale, sd3.rollout.shift) == (3.0, 1.0, 3.0)


def family_with(kind: type[SD3], folder: Path) -> Family:
    return kind(family_in(folder).architecture)


def test_a_run_with_a_family_of_ones_own(workspace: Path, random_pipeline: Path) -> None:
    """Trained, resumed and evaluated by import path; the grids of rollouts and of evaluations are each its own."""
    settings = ["small.yaml", "--family", OWN, "--policy.train", "lora", "--evaluation.num-inference-steps", "3"]
    assert train([*settings, "--iterations", "1"]) == 0
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0
    parts = build(configure([*settings, "--name", "other"]))
    assert parts.config.rollout.shift is None
    for draw, steps in ((parts.draw, 4), (parts.eval_draw, 3)):
        expected = make_schedule("dpmpp_2m", steps, 1.0 + steps, sigmas=even_sigmas(steps), last=0.05)
        assert torch.equal(draw.schedule.sigmas, expected.sigmas)
    evaluate(["runs/run", "--output", "evaluated"])
    assert Path("evaluated/evaluation.yaml").is_file()


TARGETS: dict[str, tuple[tuple[str, ...], int]] = {
    "the family's": ((), 2 * 4 + 2 * 4 - 1),
    "one end": (("attn.to_q",), 2),
    "one regular expression": ((r"transformer_blocks\.0\.attn\.to_[qk]",), 2),
}


@pytest.mark.parametrize("name", TARGETS)
def test_layers_that_get_a_lora(name: str, random_pipeline: Path) -> None:
    targets, count = TARGETS[name]
    transformer = with_lora(transformer_in(random_pipeline), Policy(lora_targets=targets, lora_rank=2), seed=0)
    assert sum("lora_A" in parameter for parameter, _ in transformer.named_parameters()) == count


def test_every_target_must_hit_a_layer(random_pipeline: Path) -> None:
    for targets, missing in ((("attn.to_q", "attn.to_out"), "attn.to_out"), ((r"blocks\.\d+\.nothing",), r"blocks\\.")):
        with pytest.raises(UserError, match=f"no linear layer of this transformer is called '{missing}"):
            with_lora(transformer_in(random_pipeline), Policy(lora_targets=targets), seed=0)
    assert isinstance(lora_targets(transformer_in(random_pipeline), Policy(lora_targets=(r"a\.b",))), str)


def test_a_distilled_model_is_not_trained_but_evaluated(workspace: Path, random_pipeline: Path) -> None:
    shutil.copytree(random_pipeline, "my-large-turbo")
    settings = ["small.yaml", "--model", "my-large-turbo", "--iterations", "1"]
    with pytest.raises(UserError, match=r"^model 'my-large-turbo' is distilled to a few steps: "):
        train(settings)
    assert not Path("runs/run").exists()
    drawn = ["--prompts", "prompts.txt", "--rewards", "jpeg", "--num-inference-steps", "2", "--output", "drawn"]
    evaluate(["my-large-turbo", *drawn])
    assert train([*settings, "--policy.allow-distilled"]) == 0


def test_guidance_that_a_model_has_already_is_not_distilled_into_it(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"^dgpo.kl_guidance_scale 2: this model reads its guidance as a number"):
        build(configure(["small.yaml", "--family", OWN, "--dgpo.kl-guidance-scale", "2"]))


def test_sizes_of_known_models() -> None:
    """Billions of weights of the transformers, as published."""
    billions = {}
    for name, make in known_models().items():
        if "stable-diffusion-3" in name:
            with torch.device("meta"):
                transformer = make_family(make()).build_transformer()
            short = name.removeprefix("stabilityai/stable-diffusion-")
            billions[short] = sum(weight.numel() for weight in transformer.parameters()) / 1e9
    expected = {"3-medium-diffusers": 2.03, "3.5-medium": 2.24, "3.5-large": 8.06, "3.5-large-turbo": 8.06}
    assert billions == pytest.approx(expected, rel=0.005)
    assert make_family(known_models()["stabilityai/stable-diffusion-3.5-large-turbo"]()).distilled
    assert not make_family(known_models()["stabilityai/stable-diffusion-3.5-large"]()).distilled


def test_what_is_no_family_is_one_line(random_pipeline: Path) -> None:
    config = replace(Config(), model=str(random_pipeline))
    for setting, line in {
        "nothing:Here": "family 'nothing:Here': no module 'nothing'",
        "pathlib:Path": "family 'pathlib:Path' is no dgpo_fast.models.family.Family: docs/families.md shows how",
        "sd3": "family 'sd3': write module:attribute as in an import",
    }.items():
        with pytest.raises(UserError, match=f"^{line}"):
            read_model(replace(config, family=setting))
    with pytest.raises(LookupError, match="this Linear has no family"):
        family_of(torch.nn.Linear(1, 1))
    assert family_of(attach(torch.nn.Linear(1, 1), family_in(random_pipeline))).title == "Stable Diffusion 3"
