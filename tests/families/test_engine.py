"""The engine on families with masked texts: whole graphs that other prompts do not add to, recordings, and FLOPs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from dgpo_fast.config.options import Config
from dgpo_fast.engine import compile
from dgpo_fast.engine.recorded import RecordedRollouts
from dgpo_fast.models.family import family_of
from dgpo_fast.models.forward import predict
from dgpo_fast.models.work import BACKWARD, DECODE, POLICY, WorkMeter
from dgpo_fast.objectives.registry import load_objective
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.schedule import make_schedule
from tests.engine.cases import EngineCase, make_config
from tests.engine.tape import TapeRecorder
from tests.families.case import Case
from tests.families.qwen_image import CASE as QWEN_IMAGE
from tests.families.sana import CASE as SANA


@pytest.fixture(scope="module", params=(QWEN_IMAGE, SANA), ids=lambda case: case.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """The case, and its pipeline's folder."""
    folder = tmp_path_factory.mktemp(request.param.name)
    request.param.make().save_pretrained(folder)
    return request.param, folder


def config_of(case: Case, **engine: str) -> Config:
    """A run on its pictures, see `make_config`."""
    config = make_config(**engine)
    height, width = case.size
    rollout = replace(config.rollout, resolution=f"{height}x{width}", max_sequence_length=case.length, batch_size=5)
    return replace(config, rollout=rollout)


def test_nothing_is_compiled_after_the_first_iteration(
    saved: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of other lengths, draws and weights; partial last batches of every kind."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compile, "BACKEND", counter)
    case = EngineCase(saved[1], config_of(saved[0], compile="on"))
    loaded, batch = load_objective(case.config), case.batch()
    case.encoder(["a picture of a prompt that is as long as the longest prompt of a run"])
    for iteration in range(3):
        with torch._dynamo.config.patch(error_on_recompile=iteration > 0):
            case.rollout([["a cat"], ["big red car", "a dog"], ["two birds"]][iteration], number=iteration)
            text = case.encoder(["a dog", "a big house", "a car"][iteration:] * 12)[slice(0, 12)]
            changed = replace(batch, iteration=iteration, text=text, x0=batch.x0 + iteration)
            loaded.accumulate(changed, case.models, case.old)
            case.models.load_weights({name: weight * 1.1 for name, weight in case.new.items()})
        if iteration == 0:
            compiled = counter.frame_count
    assert counter.frame_count == compiled > 0


def test_replays_draw_what_the_plain_path_draws(saved: tuple[Case, Path]) -> None:
    """Other prompts, noise and weights under one recording; the last batch is partial."""
    case = EngineCase(saved[1], config_of(saved[0]))
    guidance = family_of(case.pipeline.transformer).guidance(3.0)
    case.draw, plain = Draw(make_schedule(saved[0].solver, 4, 3.0), guidance, 5), case.sampler.solve
    recorder = TapeRecorder()
    recorded = RecordedRollouts(recorder)
    case.encoder(["a picture of a prompt that is as long as the longest prompt of a run"])
    for draw, prompts in enumerate((["a cat"], ["two birds", "a house", "a cat"])):
        case.new = {name: weight + 0.05 for name, weight in case.new.items()}
        case.sampler.solve = recorded
        found = case.rollout(prompts, draw)
        case.sampler.solve = plain
        assert torch.allclose(found, case.rollout(prompts, draw), atol=1e-5)
    assert len(recorder.tapes) == 1


def test_torchs_flop_counter_agrees(saved: tuple[Case, Path]) -> None:
    """Matrix products and convolutions of the policy's forward and backward, and of decoding."""
    case = EngineCase(saved[1], config_of(saved[0]))
    meter = WorkMeter(case.models, case.config.policy, case.sampler.shape)
    text, noise = case.encoder(["a cat", "two birds"]), torch.zeros(2, *case.sampler.shape)
    counters = [FlopCounterMode(display=False) for _ in range(3)]
    with meter.training(), counters[0]:
        velocity = predict(case.models.policy, noise, torch.full((2,), 500.0), text)
    with counters[1]:
        velocity.sum().backward()
    vae = case.pipeline.vae
    with torch.no_grad(), counters[2]:
        family_of(vae).decode(vae, noise)
    work = meter.model_work()
    for kind, counter in zip((POLICY, BACKWARD, DECODE), counters, strict=True):
        flops = work.count(kind, 2).flops
        assert flops["matmul"] + flops["convolution"] == counter.get_total_flops() > 0, kind
