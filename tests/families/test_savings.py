"""What a run makes of a family's blocks and shapes: compiled once, counted as torch counts, predicted in bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Policy
from dgpo_fast.engine import compile
from dgpo_fast.engine.compile import StaticBatches, compile_blocks
from dgpo_fast.memory.live import LiveBytes
from dgpo_fast.models.family import Family, attach
from dgpo_fast.models.forward import predict
from dgpo_fast.models.meta import sample_shape, stacked
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.models.work import FUSED_ATTENTION, ModelWork
from dgpo_fast.trainer import Trainer
from tests.families import flux2, lumina2, z_image
from tests.families.case import Case
from tests.families.test_end_to_end import EVERY
from tests.families.test_pictures import CASES, noise_of, relative
from tests.test_memory import tensors_alive

MADE = CASES if EVERY else (flux2.KLEIN, flux2.DEV, z_image.CASE, lumina2.CASE)
GRAPHS = {"flux2_klein": 5, "flux2_dev": 5, "z_image": 8, "lumina2": 8}
"""What is compiled: one for frozen weights of each list of blocks. With a LoRA, the first block gets nothing with a
gradient, and so has a graph of its own; of Z-Image and Lumina2, that of each refiner has."""
Made = tuple[Case, Any, Family]


@pytest.fixture(params=MADE, ids=lambda case: case.name)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """The case, its pipeline, saved in `model`, and its family, which the transformer carries."""
    pipeline = request.param.make()
    family = request.param.family_of(pipeline, tmp_path / "model")
    attach(pipeline.transformer, family)
    return request.param, pipeline, family


def scale_of(case: Case) -> float:
    return max(1.0, *case.scales.values())


def test_blocks_are_compiled_whole_and_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """For other prompts, times and latents, and for a partial batch; with a LoRA's gradient and without."""
    case, pipeline, family = made
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compile, "BACKEND", counter)
    models = PolicyModels(pipeline.transformer, Policy(lora_rank=4), seed=0)
    for transformer in (models.behaviour, models.policy):
        compile_blocks(transformer, StaticBatches([3], training=[3]))
    turns = (["a cat", "two birds", "a"], 900.0), (["a dog", "a very long street"], 350.0), (["b" * 40], 20.0)
    graphs = 0
    for turn, (texts, time) in enumerate(turns):
        rows = [family.encode(pipeline, text, case.length, negative=False) for text in texts]
        # One length for a run's prompts.
        text = TextEmbeds.of_samples(stacked(family, rows, 256)).with_embedded(family.guidance(scale_of(case)).embedded)
        x, timestep = noise_of(family, case.size, len(texts)), torch.tensor(time)
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            with torch.no_grad():
                drawn, plain = (predict(module, x, timestep, text) for module in (models.behaviour, models.base))
            trained = predict(models.policy, x, timestep, text)
            trained.square().mean().backward()
        assert relative(drawn, plain) < 1e-5
        assert relative(trained.detach(), plain) < 1e-5  # B starts at 0
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs == GRAPHS.get(case.name, graphs) >= 2 * len(family.block_names)


@pytest.mark.parametrize(("train", "merged"), [("lora", False), ("lora", True), ("full", False)])
def test_torchs_flop_counter_agrees(train: str, merged: bool, made: Made) -> None:
    case, pipeline, family = made
    embedded = family.guidance(scale_of(case)).embedded is not None
    shape = sample_shape(family, family.latent_shape(*case.size), case.length, embedded=embedded)
    policy = Policy(train=train, lora_rank=4)  # type: ignore[arg-type]
    work = ModelWork(pipeline.transformer, policy, torch.float32, shape, merged=merged)
    with FUSED_ATTENTION, FlopCounterMode(display=False) as forward:
        out = shape.predict(work.policy, 3, torch.float32)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert out.shape == (3, *family.latent_shape(*case.size))
    assert work.count("policy forward", 3).total_flops == forward.get_total_flops() > 0
    assert work.count("backward", 3).total_flops == backward.get_total_flops() > 0
    assert work.count("rollout", 3).total_flops == 3 * work.count("rollout").total_flops


@pytest.mark.parametrize("train", ["lora", "full"])
def test_predicted_memory_is_measured(train: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of tensors at the peak of a run on a CPU are those that were predicted, within 15 %; prompts are as long as
    they can be."""
    case, _, _ = made
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(letter * 600 + "\n" for letter in "abcd"))
    Path("small.yaml").write_text(yaml.safe_dump(small_run(case, train)))
    others = tensors_alive()  # held, so that no storage of theirs makes room for one of the run's
    trainer = Trainer(build(configure(["small.yaml"])))
    trainer.open_logs(tmp_path, {})
    trainer.encode_prompts()  # before the training whose memory is predicted
    trainer.console.start_training(0, 2)
    trainer.step()  # the optimizer's states are there from here on
    now = [tensor for tensor in tensors_alive() if tensor.device == trainer.device]
    theirs = {tensor.untyped_storage()._cdata for tensor in others}
    with LiveBytes([tensor for tensor in now if tensor.untyped_storage()._cdata not in theirs]) as live:
        trainer.step()
    trainer.close()
    predicted = trainer.memory.predictor.predict(trainer.config, trainer.config.policy.micro_batch_size)
    assert predicted.peak == pytest.approx(live.peak, rel=0.15)


def small_run(case: Case, train: str) -> dict[str, Any]:
    """Settings of a run on `model`."""
    height, width = case.size
    drawn = {"solver": case.solver, "num_inference_steps": 3, "guidance_scale": scale_of(case)}
    return {
        "model": "model",
        "prompts": "prompts.txt",
        "rewards": ["jpeg"],
        "device": "cpu",
        "iterations": 2,
        "rollout": {
            **drawn,
            "group_size": 4,
            "groups": 2,
            "resolution": f"{height}x{width}",
            "max_sequence_length": case.length,
            "batch_size": 4,
        },
        "dgpo": {"timesteps": 1, "high_noise_steps": 2, "kl_guidance_scale": 1.0},
        "policy": {"train": train, "lora_rank": 4, "micro_batch": 4, "allow_distilled": True},
        "evaluation": {**drawn, "images": 2},
    }
