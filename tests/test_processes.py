"""What processes tell one another, and what they say when one of them is lost."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from dgpo_fast.distributed import ALONE, connect
from dgpo_fast.distributed.gradients import sum_gradients
from dgpo_fast.errors import UserError
from tests.processes import finish, run_together, start

TALK = """
import json, math, sys, torch
from dgpo_fast.distributed import SharedError, connect
from dgpo_fast.distributed.gradients import sum_gradients
from dgpo_fast.errors import UserError

us = connect(60)
seen = {"sum": us.sum(torch.tensor([1.0, us.rank]), "a sum").tolist()}
seen["gather"] = us.gather({"rank": us.rank, "text": "ä" * us.rank, "nan": math.nan}, "values")
seen["broadcast"] = us.broadcast([us.rank, "é"], "a value")
tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)} if us.first else None
seen["tensors"] = {n: [str(t.dtype), t.tolist()] for n, t in us.broadcast_tensors(tensors, "tensors").items()}
weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (("w", (2, 3)), ("b", (3,)))}
if us.rank != 1:  # a process whose groups were all dropped has no gradients
    for weight in weights.values():
        weight.grad = torch.full_like(weight, 1.0 + us.rank)
numbers = sum_gradients(weights, {"loss": torch.tensor(float(us.rank))}, us, "gradients")
seen["gradients"] = [weight.grad.tolist() for weight in weights.values()]
seen["loss"] = float(numbers["loss"])
with us.together("a good step"):
    pass
try:
    with us.together("a bad step"):
        if us.rank == 1:
            raise UserError("no prompts here")
except SharedError as error:
    seen["error"] = str(error)
assert us.take_waited_s() > 0 and us.take_waited_s() == 0
us.close()
print(json.dumps(seen))
"""


def test_three_processes_agree() -> None:
    outputs = [json.loads(text) for text in run_together(["-c", TALK], 3)]
    for seen in outputs:
        assert seen["sum"] == [3.0, 3.0]
        assert [value["text"] for value in seen["gather"]] == ["", "ä", "ää"]
        assert all(math.isnan(value["nan"]) for value in seen["gather"])
        assert seen["broadcast"] == [0, "é"]
        assert seen["tensors"] == {"a": ["torch.float32", [0, 1, 2]], "b": ["torch.bfloat16", [[1, 1], [1, 1]]]}
        assert seen["gradients"] == [[[4.0] * 3] * 2, [4.0] * 3] and seen["loss"] == 3.0
        assert seen["error"] == "no prompts here (process 1)"


LOSE = """
import os, sys, time
from dgpo_fast.distributed import connect
from dgpo_fast.errors import UserError

us = connect(60)
us.set_timeout(3)
us.gather(0, "the start")
if us.rank == 1:
    {fate}
try:
    us.gather(0, "the rewards of iteration 7")
except UserError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)  # as the command ends: gloo's threads may abort an orderly exit after a lost connection
"""


@pytest.mark.parametrize("fate", ["os._exit(9)", "time.sleep(8)"], ids=["dies", "hangs"])
def test_a_lost_process_is_noticed_and_what_was_waited_for_is_named(fate: str) -> None:
    """At once where it died, after the deadline where it hangs."""
    started = time.monotonic()
    status, _, errors = finish(start(["-c", LOSE.format(fate=fate)], 2))[0]
    assert status == 1 and "for the rewards of iteration 7 and lost the others" in errors, errors
    assert "Traceback" not in errors and time.monotonic() - started < 60


def test_one_process_needs_no_group() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    assert ALONE.gather(3, "") == [3] and ALONE.broadcast("x", "") == "x"
    assert sum_gradients({"w": weight}, {"loss": torch.tensor(2.0)}, ALONE, "")["loss"] == 2.0
    assert not torch.distributed.is_initialized()
    with pytest.raises(UserError, match="bad"), ALONE.together("a step"):
        raise UserError("bad")


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK is not set: start the processes with torchrun"):
        connect(1)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE=two: not a number"):
        connect(1)


def test_nothing_is_unpickled_between_processes() -> None:
    source = (Path(__file__).parents[1] / "dgpo_fast/distributed/processes.py").read_text()
    assert "_object" not in source and "import pickle" not in source
