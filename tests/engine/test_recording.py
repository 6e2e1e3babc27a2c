"""Recorded rollouts, by a recorder that is stricter than CUDA graphs; the real one is in `test_cuda.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgpo_fast.engine.recorded import RecordedRollouts
from dgpo_fast.models.family import Guidance
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.schedule import make_schedule
from tests.engine.cases import EngineCase, make_config
from tests.engine.tape import Tape, TapeRecorder


@pytest.fixture(scope="module")
def case(random_pipeline: Path) -> EngineCase:
    return EngineCase(random_pipeline, make_config())


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_replays_draw_what_the_plain_path_draws(case: EngineCase, solver: str, guidance_scale: float) -> None:
    """Other prompts, noise and weights under one recording; the last batch is partial. Nothing is recorded twice."""
    case.draw, plain = Draw(make_schedule(solver, 4, 3.0), Guidance(guidance_scale), 5), case.sampler.solve
    recorder = TapeRecorder()
    recorded = RecordedRollouts(recorder)
    for draw, prompts in enumerate((["a cat"], ["two birds", "a house", "a cat"])):
        case.new = {name: weight + 0.05 for name, weight in case.new.items()}
        case.sampler.solve = recorded
        found = case.rollout(prompts, draw)
        if draw == 0:
            (tape,), (recording,) = recorder.tapes, recorded.recordings.values()
            addresses = {name: tensor.data_ptr() for name, tensor in recording.inputs.items()}
        case.sampler.solve = plain
        expected = case.rollout(prompts, draw)
        assert torch.allclose(found, expected, atol=1e-5)
    assert recorder.tapes == [tape], "one recording serves all batches"
    assert {name: tensor.data_ptr() for name, tensor in recording.inputs.items()} == addresses


@pytest.mark.parametrize("keep", [True, False])
def test_replays_draw_the_noise_of_each_step(case: EngineCase, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of their own draw and samples, under one recording, and keep the steps that an objective learns from."""
    # Equal groups share their noise on a CPU alone; to find them is to wait for a GPU.
    monkeypatch.setattr(torch, "unique", lambda groups, return_inverse: (groups, torch.arange(len(groups))))
    case.draw, plain = Draw(make_schedule("euler", 4, 3.0, noise_level=0.7), Guidance(3.0), 5), case.sampler.solve
    recorder = TapeRecorder()
    recorded = RecordedRollouts(recorder)
    drawn = []
    for draw in (4, 9):
        case.sampler.solve = recorded
        found, mine = case.rollout(number=draw, keep=keep), case.transitions
        case.sampler.solve = plain
        drawn.append(case.rollout(number=draw, keep=keep))
        theirs = case.transitions
        assert torch.allclose(found, drawn[-1], atol=1e-5)
        if keep:
            assert mine is not None and theirs is not None and torch.equal(mine.states[-1], found)
            assert torch.allclose(mine.states, theirs.states, atol=1e-5)
            assert torch.allclose(mine.log_prob, theirs.log_prob, atol=1e-6)
    assert len(recorder.tapes) == 1 and not torch.allclose(*drawn, atol=0.1)


def test_replays_run_no_python_of_the_model(case: EngineCase) -> None:
    forwards, case.draw = [], Draw(make_schedule("dpmpp_2m", 4, 3.0), Guidance(3.0), 5)
    hook = case.models.behaviour.register_forward_pre_hook(lambda *_: forwards.append(1))
    plain, case.sampler.solve = case.sampler.solve, RecordedRollouts(TapeRecorder())
    case.rollout(number=1)
    recorded = len(forwards)
    case.rollout(number=2)
    hook.remove()
    case.sampler.solve = plain
    assert recorded == len(forwards) > 0


def test_the_double_refuses_what_a_capture_refuses() -> None:
    x = torch.arange(3.0)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool((x > 1).all()), lambda: torch.tensor([1.0])):
        with pytest.raises(AssertionError, match="no graph can hold it"), Tape():
            wait()
    with Tape() as tape:
        y = (x[1:] * 2).add_(1)
    x += 10
    tape.replay()
    assert y.tolist() == [23.0, 25.0]


def test_the_double_refuses_memory_that_nobody_keeps() -> None:
    """A graph reads what its function read from outside where that was, and does not keep it."""
    kept = torch.ones(3)

    def recorded(recorder: TapeRecorder) -> Callable[[], object]:
        lost = torch.full((3,), 2.0)
        return recorder.record(lambda: kept + lost.view(3, 1).sum(1))[1]

    replay = recorded(TapeRecorder())
    with pytest.raises(AssertionError, match="was freed after it"):
        replay()
    output, replay = TapeRecorder().record(lambda: kept * 2)
    kept.fill_(5)
    replay()
    assert output.tolist() == [10, 10, 10]
