"""Parts of an iteration of the shipped pipeline: ``pytest benchmarks/test_throughput.py --benchmark-only``.

`throughput.py` measures the same in turns and against compiled baselines, and is what results come from.
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.rewards import Brightness  # noqa: E402
from benchmarks.systems import OURS, Comparison, Ours  # noqa: E402
from benchmarks.throughput import FIRST, Bench  # noqa: E402
from dgpo_fast.config.command_line import configure  # noqa: E402


@cache
def comparison() -> Comparison:
    """B and ours on one group of sixteen images, without torch.compile."""
    bench = Bench("cpu", groups=1, rounds=1, minutes=1, only=[], path=Path(), settings=["--engine.compile", "off"])
    ours = Ours(configure(bench.arguments(FIRST)), bench.device)
    return Comparison(ours, ["B"], groups=1, rounds=1, until=bench.until)


def actions(name: str) -> dict[str, Callable[[], Any]]:
    found = comparison()
    with found._built(["B", OURS]):
        system, inputs = found.systems[name], found.ours.inputs(0, groups=1)
    return {"decode": lambda: system.decode(inputs.noise), "iteration": lambda: system.iteration(inputs, Brightness())}


def test_gradients_are_the_same() -> None:
    """Without this, no figure below says anything. It comes first: the others move the weights."""
    verdict = comparison().check_gradients()
    assert verdict["same"], verdict


@pytest.mark.parametrize("part", ["decode", "iteration"])
@pytest.mark.parametrize("name", ["B", OURS])
def test_speed(name: str, part: str, benchmark: Any) -> None:
    benchmark.pedantic(actions(name)[part], rounds=3, warmup_rounds=1)
