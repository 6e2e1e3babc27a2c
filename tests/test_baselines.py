"""The baselines of `benchmarks/throughput.py`: the gradient that ours has, in turns, and in the memory there is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.faster_baselines import BASELINES, LORA_ONLY, CompiledMerged
from benchmarks.rewards import Brightness
from benchmarks.systems import OURS, Comparison, Ours, rotated
from benchmarks.throughput import CASES, FIRST, Bench, options
from dgpo_fast.config.command_line import configure

GUIDED = ["--dgpo.kl-guidance-scale", "2", "--dgpo.guided-reference", "True"]


def compared(*settings: str) -> Comparison:
    """Everyone beside ours on one group of the shipped pipeline; nothing is compiled."""
    settings = ("--engine.compile", "off", *settings)
    bench = Bench("cpu", groups=1, rounds=1, minutes=1, only=[], path=Path(), settings=settings)
    return Comparison(
        Ours(configure(bench.arguments(FIRST)), bench.device),
        bench.beside(FIRST),
        groups=1,
        rounds=1,
        until=bench.until,
    )


@pytest.fixture(scope="module")
def plainly() -> Iterator[None]:
    """Blocks run as they are: what the compiler makes of them is not asked here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.Module, "compile", lambda self, **options: None)
        yield


@pytest.fixture(scope="module")
def comparison(plainly: None) -> Comparison:
    return compared()


def test_all_have_the_same_gradient(comparison: Comparison) -> None:
    """C′ too, at weights of which θ_old's differ, so that the merged copies are not each other's."""
    verdict = comparison.check_gradients()
    assert verdict["same"] and not verdict["missing"], verdict
    assert set(verdict["relative_error"]) == {*BASELINES, OURS}


def test_a_guided_reference_is_everyone_s(plainly: None) -> None:
    verdict = compared(*GUIDED).check_gradients()
    assert verdict["same"] and not verdict["missing"], verdict


def test_merged_copies_are_those_of_the_weights(comparison: Comparison) -> None:
    """After an optimizer step, rollouts are the policy's, and θ_old's prediction is that of the average in B."""
    with comparison._built([*BASELINES, OURS]):
        merged, eager = comparison.systems["C′"], comparison.systems["B"]
        inputs = comparison.ours.inputs(0, groups=1)
        for system in (merged, eager):
            system.iteration(inputs, Brightness())
        text, timestep = merged.encode(inputs.prompts), torch.tensor(500.0)
        with torch.no_grad():
            for one, other in ((merged.drawing, merged.policy), (merged.old_model, eager.old_model)):
                found, expected = (merged.velocity(model, inputs.noise, timestep, text) for model in (one, other))
                assert float((found - expected).norm() / expected.norm()) < 1e-4
            drawn, old = (merged.velocity(m, inputs.noise, timestep, text) for m in (merged.drawing, merged.old_model))
        assert merged.drawing is not merged.policy and not torch.equal(drawn, old)
    names = {name.split(".lora_")[0] for name in comparison.weights}
    assert all(type(merged.drawing.get_submodule(name)) is nn.Linear for name in names)


def test_fully_fine_tuned_there_is_nothing_to_merge() -> None:
    bench = Bench("cpu", groups=1, rounds=1, minutes=1, only=[], path=Path())
    full = next(case for case in CASES if case.train == "full")
    assert bench.beside(FIRST) == [*BASELINES] and LORA_ONLY in BASELINES
    assert bench.beside(full) == [name for name in BASELINES if name != LORA_ONLY]
    config = configure(bench.arguments(full))
    unmade = object.__new__(CompiledMerged)
    unmade.config = config
    with pytest.raises(ValueError, match="nothing to merge: C′ is C"):
        unmade.make_models({})


def test_each_round_begins_with_another() -> None:
    orders = [rotated(["A", "B", "ours"], turn) for turn in range(4)]
    assert orders == [["A", "B", "ours"], ["B", "ours", "A"], ["ours", "A", "B"], ["A", "B", "ours"]]
    assert rotated([], 3) == []


def test_a_micro_batch_that_does_not_fit_is_halved() -> None:
    """In whole groups, down to one; then the error is the row's."""
    cleared: list[int] = []

    def system(most: int) -> tuple[SimpleNamespace, Callable[[SimpleNamespace], int]]:
        def action(of: SimpleNamespace) -> int:
            if of.micro_batch > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return of.micro_batch

        made = SimpleNamespace(micro_batch=64, phases=SimpleNamespace(take=dict))
        made.clear_gradient = lambda: cleared.append(made.micro_batch)
        return made, action

    for most, fits in ((64, 64), (40, 32), (16, 16)):
        made, action = system(most)
        config = SimpleNamespace(rollout=SimpleNamespace(group_size=16))
        beside = SimpleNamespace(systems={"A": made}, config=config, device=torch.device("cpu"))
        assert Comparison._fitting(beside, "A", action) == fits  # type: ignore[arg-type]
    assert cleared == [64, 64, 32]
    made, action = system(8)
    beside.systems = {"A": made}
    with pytest.raises(torch.OutOfMemoryError):
        Comparison._fitting(beside, "A", action)  # type: ignore[arg-type]


def test_baselines_are_named_on_the_command_line() -> None:
    """With a plain apostrophe or the sign for a prime; all by default."""
    assert options(["--systems", "B", "C'", "C′"])[0].systems == ["B", "C′", "C′"]
    assert options([])[0].systems == list(BASELINES)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_batches_on_a_large_card(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 groups, rollouts of 32 images and micro-batches of as many whole groups; on a CPU, batches are a group."""
    monkeypatch.setattr("benchmarks.throughput.memory_gib", lambda device: 139.0)
    for device, batch in (("cuda", 32), ("cpu", None)):
        given, _ = options(["--device", device])
        bench = Bench(device, groups=given.groups, rounds=1, minutes=1, only=[], path=Path())
        for case in (case for case in CASES if case.train == train):
            config = configure(bench.arguments(case))
            assert config.rollout.groups == 4 and config.rollout.batch_size == (batch or case.group_size)
            assert config.policy.micro_batch_size == {16: batch or 16, 24: 24}[case.group_size]
