"""Faults on one process of two: what happens on both. All of them run in one pair of processes, one after another."""

import json
import os
from pathlib import Path

import pytest

from tests.distributed_runs import make_workspace
from tests.processes import run_together

FAULTS = """
import json, math, sys
from pathlib import Path
import torch
from dgpo_fast.config.command_line import configure
from dgpo_fast.distributed import connect
from dgpo_fast.errors import UserError
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.build import build
from dgpo_fast.trainer import Trainer

us = connect(120)

def trainer(name, *extra):
    made = Trainer(build(configure(["small.yaml", "--rollout.groups", "2", *extra]), us))
    folder = Path("runs") / name
    if us.first:
        folder.mkdir(parents=True)
    made.open_logs(folder, {})
    made.console.start_training(0, 9)
    return made, folder

def break_gradient(made, iterations):
    original = made.learner.objective.accumulate
    def accumulate(batch, models, old):
        losses = original(batch, models, old)
        if us.rank == 1 and batch.iteration in iterations:
            next(iter(models.weights.values())).grad[0, 0] = math.nan
        return losses
    made.learner.objective.accumulate = accumulate

def weights(made):
    return torch.cat([w.detach().flatten() for w in made.models.weights.values()])

seen = {"refused": []}
wrong = ["--rewards", "nowhere:Reward"], ["--rollout.max-sequence-length", "0"]  # before each of the set-up's questions
for settings in wrong:
    try:
        with us.together("the set-up of all processes"):
            trainer("refused", "--policy.micro-batch", "auto", *(settings if us.rank == 1 else ()))
    except UserError as error:
        seen["refused"].append(str(error))
seen["refused everywhere"] = us.gather(seen["refused"], "refused")

made, folder = trainer("skip")
break_gradient(made, [1])
moved = []
for _ in range(3):
    before = weights(made)
    made.step()
    moved.append(not torch.equal(before, weights(made)))
seen["moved"] = us.gather(moved, "moved")
if us.first:
    lines = read_metrics(folder / "metrics.jsonl")
    seen["skipped"] = [line["steps_skipped_count"] for line in lines]
    seen["clock"] = {name: lines[0][name] for name in ("waited_s", "imbalance", "processes")}

made, folder = trainer("stop", "--optimizer.max-skipped-steps", "2")
break_gradient(made, range(9))
try:
    for _ in range(5):
        made.step()
except UserError as error:
    seen["stopped"] = [made.iteration, str(error)]
seen["stopped everywhere"] = us.gather(seen.get("stopped"), "stopped")
if us.first:
    seen["dump"] = json.loads((folder / "dump-000002.json").read_text())

made, folder = trainer("drift", "--distributed.check-every", "2")
made.step()
if us.rank == 1:
    with torch.no_grad():
        next(iter(made.models.weights.values())).view(torch.int32)[0, 0] ^= 1  # one bit
try:
    made.step()
except UserError as error:
    seen["drift"] = str(error)
made.save(folder)
seen["saved after drift"] = (folder / "checkpoints").exists()
us.close()
if us.first:
    Path("seen.json").write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, random_pipeline: Path) -> dict:
    folder, before = tmp_path_factory.mktemp("faults"), Path.cwd()
    make_workspace(folder, random_pipeline)
    os.chdir(folder)
    try:
        run_together(["-c", FAULTS], 2)
        return json.loads(Path("seen.json").read_text())
    finally:
        os.chdir(before)


def test_a_set_up_that_fails_on_one_process_is_told_by_all(seen: dict) -> None:
    """The others wait for the micro-batch or for the engine's choices by then."""
    reward, text = seen["refused"]
    assert reward.startswith("reward 'nowhere:Reward'") and reward.endswith("(process 1)")
    assert text.startswith("rollout.max_sequence_length 0") and text.endswith("(process 1)")
    assert seen["refused everywhere"] == [seen["refused"]] * 2


def test_a_nan_on_one_process_skips_the_step_on_all(seen: dict) -> None:
    assert seen["moved"] == [[True, False, True]] * 2
    assert seen["skipped"] == [0, 1, 0]


def test_too_many_skipped_steps_stop_the_run_with_a_dump(seen: dict) -> None:
    iteration, line = seen["stopped"]
    assert iteration == 1 and "the gradient is not finite (process 1)" in line and "the 2. in a row" in line
    assert seen["stopped everywhere"] == [seen["stopped"]] * 2
    assert seen["dump"]["iteration"] == 2 and all(w["not_finite"] == 0 for w in seen["dump"]["weights"].values())


def test_one_bit_of_drift_is_found_and_never_saved(seen: dict) -> None:
    assert "after iteration 2: process 1 has other policy weights" in seen["drift"]
    assert not seen["saved after drift"]


def test_metrics_say_where_the_time_went(seen: dict) -> None:
    clock = seen["clock"]
    assert clock["waited_s"] > 0 and clock["imbalance"] >= 1 and len(clock["processes"]) == 2
    assert all("rollout_s" in theirs and "waited_s" in theirs for theirs in clock["processes"])
