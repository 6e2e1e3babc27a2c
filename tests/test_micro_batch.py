"""The micro-batch that fits: chosen by prediction, by measurement on a pretended GPU, and as given."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Config
from dgpo_fast.config.options import Optimizer as OptimizerConfig
from dgpo_fast.config.recipes import RECIPES, get_recipe
from dgpo_fast.distributed import ALONE
from dgpo_fast.errors import UserError
from dgpo_fast.memory import plan
from dgpo_fast.memory.micro_batch import MemoryLine, fit
from dgpo_fast.memory.plan import MemoryPlan
from dgpo_fast.objectives.dgpo import DGPOObjective
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.train import train
from tests.sd3 import medium

GB = 1e9


@given(st.integers(1, 200), st.integers(1, 40), st.integers(2, 24))
def test_a_micro_batch_fits_and_is_even(most: int, groups: int, size: int) -> None:
    """Never more than fits nor than there is; whole groups where one fits; at least half of what would fit."""
    samples = groups * size
    chosen = fit(most, samples, size)
    assert 1 <= chosen <= min(most, samples)
    assert chosen % size == 0 if most >= size else chosen < size
    unit = size if most >= size else 1
    assert chosen >= min(most, samples) // unit * unit / 2
    padded = -(-samples // chosen) * chosen
    assert padded <= -(-samples // (min(most, samples) // unit * unit)) * (min(most, samples) // unit * unit)


def test_even_micro_batches_by_hand() -> None:
    assert fit(50, samples=128, group_size=16) == 32, "3 groups would leave a third batch with 2 of them"
    assert fit(48, samples=144, group_size=16) == 48
    assert fit(1000, samples=128, group_size=16) == 128
    assert fit(15, samples=128, group_size=16) == 8


def test_a_line_through_two_measurements() -> None:
    line = MemoryLine.through(lambda size: 1000 + 7 * size, 16, 32)
    assert (line.fixed, line.per_sample) == (1000, 7)
    assert [line.largest(n) for n in (999, 1006, 1007, 1070)] == [0, 0, 1, 10]


class OnGpu:
    """A GPU's memory, as `MemoryPlan` sees it."""

    def __init__(self, free: float, most: int = 10**9):
        self.free, self.most, self.tried = free, most, []  # type: float, int, list[int]

    def __call__(self, *args: Any) -> "OnGpu":
        return self

    def measure(self, samples: int) -> int:
        self.tried.append(samples)
        if samples > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore lines")
        return int((0.5 + 2 * samples) * GB)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a plan for SD3.5-Medium on a GPU with the given free bytes, on which the given samples fit."""

    def make(free: float, most: int = 10**9) -> tuple[MemoryPlan, OnGpu, list[str]]:
        card, notes = OnGpu(free, most), []  # type: OnGpu, list[str]
        measure = type("Measure", (), {"__call__": lambda self, n: card.measure(n), "release": lambda self: None})
        monkeypatch.setattr(plan, "TrainingMemory", lambda models, shape: measure())
        monkeypatch.setattr(plan, "room_for_graphs", lambda device: free > 40 * GB)
        monkeypatch.setattr(MemoryPlan, "free_bytes", lambda self: card.free)
        monkeypatch.setattr(MemoryPlan, "_headroom", lambda self: 5 * GB)
        return MemoryPlan(medium(), torch.device("cuda"), torch.bfloat16, ALONE, notes.append), card, notes

    yield make


def auto(*args: str) -> Config:
    return configure(["sd35m-geneval", "--policy.micro-batch", "auto", *args])


def test_auto_takes_what_fits_by_measurement(gpu: Any) -> None:
    """Two steps are measured, of one and of two groups, and the numbers that decided are said."""
    memory, card, notes = gpu(free=90 * GB)
    config = memory.measure(memory.predict(auto()), models=None)
    assert card.tried == [16, 32]
    assert config.policy.micro_batch == 32, "39 fit beside what is to come, and groups are of 16"
    assert re.search(
        r"micro-batches of 32 samples \(2 groups\): a sample takes 1\.9 GiB by measurement, .* fit", notes[-1]
    )


def test_auto_below_a_group(gpu: Any) -> None:
    """Where two groups do not fit to be measured, samples are; and where not one fits, the remedies are named."""
    memory, card, notes = gpu(free=26 * GB, most=12)
    config = memory.measure(memory.predict(auto()), models=None)
    assert card.tried == [16, 1, 2] and config.policy.micro_batch == 8
    assert "8 samples, less than a group, which costs one more forward" in notes[-1]
    memory, _, _ = gpu(free=6 * GB)
    with pytest.raises(UserError, match=r"micro_batch auto: a sample needs 1\.9 GiB in training and .* are left"):
        memory.measure(memory.predict(auto()), models=None)


def test_auto_leaves_room_for_what_is_made_later(gpu: Any) -> None:
    """A group's 32.5 GB fit into 41, but not beside recorded rollouts; into 43, but not beside a float8 copy too."""
    plain, float8 = ["--engine.cuda-graphs", "off"], ["--engine.rollout-precision", "fp8"]
    for free, settings, fits in ((41, plain, 16), (41, [], 8), (43, [], 16), (43, float8, 8)):
        memory, _, _ = gpu(free=free * GB)
        assert memory.measure(memory.predict(auto(*settings)), models=None).policy.micro_batch == fits


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_what_fits_the_card(name: str, gpu: Any) -> None:
    """Those of SD3.5-Medium with the first three objectives. The shipped pipeline's have a number, so that their
    results are the same everywhere."""
    recipe = get_recipe(name)
    assert not name.startswith("tiny-") or isinstance(recipe.policy.micro_batch, int)
    if not name.startswith("sd35m-") or recipe.policy.micro_batch == 24:
        return
    assert recipe.policy.micro_batch == "auto"
    memory, _, _ = gpu(free=110 * GB)
    config = memory.measure(memory.predict(configure([name])), models=None)
    assert config.policy.micro_batch_size % recipe.rollout.group_size == 0


def test_a_given_micro_batch_is_not_measured(gpu: Any) -> None:
    memory, card, _ = gpu(free=90 * GB)
    config = memory.measure(memory.predict(configure(["sd35m-geneval", "--policy.micro-batch", "16"])), models=None)
    assert card.tried == [] and config.policy.micro_batch == 16


def test_more_than_is_free_is_said_before(gpu: Any) -> None:
    memory, _, notes = gpu(free=20 * GB)
    memory.predict(configure(["sd35m-geneval", "--policy.micro-batch", "16"]))
    assert notes[0].startswith("predicted memory 41.6 GiB")
    assert "more than the 18.6 GiB that are free. Start with one of these" in notes[1]
    assert "--policy.micro-batch 8 (15." in notes[1]


def test_auto_on_a_cpu_is_recorded_and_resumed(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number goes into config.yaml, a resumed run takes it again, and the run is that with the number given."""
    assert train(["small.yaml", "--policy.micro-batch", "auto", "--iterations", "2"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"predicted memory [0-9.]+ MiB at its peak, in \w+: .*, with micro-batches of 12 samples", output)
    assert "micro_batch: 12\n" in (workspace / "runs/run/config.yaml").read_text()
    assert train(["--resume", "runs/run", "--iterations", "3"]) == 0
    assert train(["small.yaml", "--policy.micro-batch", "12", "--iterations", "3", "--name", "given"]) == 0
    losses = [[line["loss"] for line in read_metrics(Path(f"runs/{name}/metrics.jsonl"))] for name in ("run", "given")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("value", ["many", "0"])
def test_a_wrong_micro_batch_is_named(value: str) -> None:
    with pytest.raises(UserError, match=rf"policy.micro_batch: input should be .* or 'auto', not '{value}'"):
        configure(["--policy.micro-batch", value])


def test_running_out_of_memory_names_what_would_help(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: where it happened, what the device said, and three settings with what each saves there."""

    def full(self: DGPOObjective, *args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of …")

    monkeypatch.setattr(DGPOObjective, "accumulate", full)
    with pytest.raises(UserError) as caught:
        train(["small.yaml", "--policy.train", "full"])
    line = str(caught.value)
    assert line.startswith("iteration 1, train: CUDA out of memory. Tried to allocate 2.00 GiB. Use --resume with ")
    remedies = re.findall(r"(--\w+\.\S+)[^(,]*\(([0-9.]+) MiB", line)
    assert len(remedies) == 3 and "\n" not in line
    assert [float(saved) for _, saved in remedies] == sorted((float(saved) for _, saved in remedies), reverse=True)


def test_advice_is_for_the_phase_that_failed(gpu: Any) -> None:
    """A smaller micro-batch does not help where pictures are decoded."""
    memory, _, _ = gpu(free=90 * GB)
    config = replace(
        configure(["sd35m-geneval", "--policy.micro-batch", "16"]), optimizer=OptimizerConfig(name="adamw8bit")
    )
    assert "--policy.micro-batch" in memory.advice(config, "train")
    decoding = memory.advice(config, "decode")
    assert "--policy.micro-batch" not in decoding and "--rollout.batch-size 16" in decoding
