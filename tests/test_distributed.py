"""A run on several processes is the run on one: the same latents, gradients, metrics and weights."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.distributed import ALONE, Processes
from dgpo_fast.errors import UserError
from tests.distributed_runs import SCENARIOS, make_workspace, run
from tests.processes import run_together

RESUMED = "lora=runs/2-lora"
JUDGED = "judged groups of any size"
SAME_SHAPES, HYBRID = "samples one by one, uneven shares", "hybrid shards"
# Three processes hold a group each; two hold shares that differ in size; four must split groups.
COUNTS = {
    2: [name for name in SCENARIOS if "shard" not in name],
    3: ["lora", RESUMED],
    4: [
        "lora",
        SAME_SHAPES,
        "small micro-batches, std of the iteration",
        "growing and gated KL",
        "groups dropped",
        "pairs",
        JUDGED,
        "centred rewards",
        HYBRID,
    ],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, random_pipeline: Path) -> dict[int, dict[str, Any]]:
    """processes → scenario → what came out."""
    folder, before = tmp_path_factory.mktemp("distributed"), Path.cwd()
    make_workspace(folder, random_pipeline)
    os.chdir(folder)
    try:
        found: dict[int, dict[str, Any]] = {}
        for count, scenarios in COUNTS.items():
            # Hybrid shards lie on the two processes of each of two machines.
            run_together(["-m", "tests.distributed_runs", *scenarios], count, machines=2 if HYBRID in scenarios else 1)
            found[count] = json.loads(Path(f"{count}.json").read_text())
        found[1] = {name: run(name, Path("runs/1") / str(n), ALONE) for n, name in enumerate([*COUNTS[2], HYBRID])}
        found[1][RESUMED] = run("lora", Path("runs/1/resumed"), ALONE, Path("runs/2-lora"))
        return found
    finally:
        os.chdir(before)


CASES = [(count, name) for count, names in COUNTS.items() for name in names if "=" not in name]


@pytest.mark.parametrize(("count", "name"), CASES)
def test_latents_are_the_same(count: int, name: str, outcomes: dict) -> None:
    """To the last bit where batch shapes are: the first iteration's noise is, and so is every forward of two."""
    mine, alone = (np.array(outcomes[n][name]["latents"], np.float32) for n in (count, 1))
    np.testing.assert_allclose(mine, alone, rtol=0, atol=1e-5)
    if count in (2, 3) or name == SAME_SHAPES:  # their shares begin at multiples of the rollout's batch
        assert (mine == alone).all()


@pytest.mark.parametrize(("count", "name"), CASES)
def test_the_gradient_is_the_same(count: int, name: str, outcomes: dict) -> None:
    mine, alone = (np.array(outcomes[n][name]["gradient"]) for n in (count, 1))
    assert np.abs(alone).max() > 0
    # On four processes most forwards have other batch shapes, and with them the images other last bits; those of groups
    # of any size have them on two.
    tolerance = 5e-6 if (count == 4 and name != SAME_SHAPES) or name == JUDGED else 1e-6
    rtol = 0 if name == SAME_SHAPES else 1e-5
    np.testing.assert_allclose(mine, alone, rtol=rtol, atol=tolerance * np.abs(alone).max())


@pytest.mark.parametrize(("count", "name"), CASES)
def test_metrics_and_weights_are_the_same(count: int, name: str, outcomes: dict) -> None:
    """After twenty iterations of `lora`, fewer of the others."""
    same_metrics(outcomes[count][name]["metrics"], outcomes[1][name]["metrics"])
    mine, alone = (np.array(outcomes[n][name]["weights"]) for n in (count, 1))
    assert np.abs(mine - alone).max() < 1e-3 * np.abs(alone).max()


@pytest.mark.parametrize("count", [1, 3])
def test_a_checkpoint_of_two_processes_resumes_on(count: int, outcomes: dict) -> None:
    resumed = outcomes[count][RESUMED]["metrics"]
    assert [line["iteration"] for line in resumed] == list(range(18, 21))
    same_metrics(resumed, outcomes[1]["lora"]["metrics"][17:])


def test_groups_were_dropped_and_shares_were_uneven(outcomes: dict) -> None:
    """The scenarios are what their names say."""
    dropped = [line["groups_dropped_count"] for line in outcomes[4]["groups dropped"]["metrics"]]
    assert sum(dropped) > 0
    assert outcomes[1]["groups dropped"]["metrics"][0]["loss"] is not None
    assert len(outcomes[2]["lora"]["latents"]) == 12


class Compared:
    """Scores pictures by their place among those that it sees."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        return images.mean((1, 2, 3)).argsort().argsort()


class Reached(Exception):
    """What comes after the check."""


@pytest.mark.parametrize(
    ("reward", "settings", "outcome"),
    [
        (f"{__name__}:Compared", ["--rollout.groups", "3"], UserError),
        (f"{__name__}:Compared", ["--rollout.groups", "4"], Reached),
        (f"{__name__}:Compared", ["--rollout.groups", "3", "--data.source", "offline"], Reached),
        ("tests.distributed_runs:Brightness", ["--rollout.groups", "3"], Reached),
    ],
    ids=["groups cut", "whole groups", "offline groups", "pictures scored alone"],
)
def test_no_process_scores_a_part_of_a_group_unless_the_reward_allows_it(
    reward: str, settings: list[str], outcome: type[Exception], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a reward would give four processes other scores than one. Each offline group is one process's own."""
    monkeypatch.setattr("dgpo_fast.build.MemoryPlan", Mock(side_effect=Reached))
    config = configure(["small.yaml", "--rewards", reward, *settings])
    with pytest.raises(outcome, match=r"^reward .*Compared' may compare" if outcome is UserError else None):
        build(config, Processes(rank=1, count=4))


def same_metrics(mine: list[dict], alone: list[dict]) -> None:
    clock = ("_s", "_mib", "tflops", "mfu")
    assert len(mine) == len(alone)
    for line, expected in zip(mine, alone, strict=True):
        for name, value in expected.items():
            if name.endswith(clock) or isinstance(value, str) or value is None:
                continue
            if isinstance(value, list):
                np.testing.assert_allclose(line[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
                continue
            # Differences of two nearly equal losses have the rounding of the losses. The loss itself can be near 0.
            floor = {"dsm_gap": abs(expected.get("dsm_policy", 0.0)), "loss": 1e-3}
            scale = max(floor.get(name, 0.0), abs(value))
            bound = 1e-2 if name.startswith("look/") else 1e-3  # pictures are rounded to 256 levels
            assert abs(line[name] - value) <= bound * scale + 1e-6, (line["iteration"], name, line[name], value)
