"""What processes tell one another, and what they say when one of them is lost."""

import ast
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dgpo_fast.distributed import ALONE, LostError, Processes, connect
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
sum_gradients(weights, us, "gradients")
seen["gradients"] = [weight.grad.tolist() for weight in weights.values()]
with us.together("a good step"):
    pass
try:
    with us.together("a bad step"):
        if us.rank == 1:
            raise UserError("no prompts here")
except SharedError as error:
    seen["error"] = str(error)
for name, failure in {"refused": UserError("no reward 'x' here"), "broken": ValueError("a bug")}.items():
    try:
        with us.together("a step with others in it"):
            us.gather(us.rank, "ranks")
            if us.rank == 1:
                raise failure
            us.broadcast(0, "what process 1 never asks for")
            us.sum(torch.ones(1), "nor this")
    except (UserError, ValueError) as error:
        seen[name] = [type(error).__name__, str(error)]
with us.together("a good step with others in it"):
    seen["ranks"] = us.gather(us.rank, "ranks")
assert us.take_waited_s() > 0 and us.take_waited_s() == 0
us.close()
print(json.dumps(seen))
"""


def test_three_processes_agree() -> None:
    outputs = [json.loads(text) for text in run_together(["-c", TALK], 3)]
    for rank, seen in enumerate(outputs):
        assert seen["sum"] == [3.0, 3.0]
        assert [value["text"] for value in seen["gather"]] == ["", "ä", "ää"]
        assert all(math.isnan(value["nan"]) for value in seen["gather"])
        assert seen["broadcast"] == [0, "é"]
        assert seen["tensors"] == {"a": ["torch.float32", [0, 1, 2]], "b": ["torch.bfloat16", [[1, 1], [1, 1]]]}
        assert seen["gradients"] == [[[4.0] * 3] * 2, [4.0] * 3]
        assert seen["error"] == "no prompts here (process 1)"
        assert seen["refused"] == ["SharedError", "no reward 'x' here (process 1)"], "where the others wait for it, too"
        own, told = ["ValueError", "a bug"], ["SharedError", "ValueError: a bug (process 1)"]
        assert seen["broken"] == (own if rank == 1 else told)
        assert seen["ranks"] == [0, 1, 2]


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


FAIL_ALONE = """
import os, sys
from dgpo_fast.distributed import connect
from dgpo_fast.errors import UserError

us = connect(60)
us.gather(0, "the start")
try:
    with us.together("the set-up"):
        if us.rank == 1:
            os._exit(9)
        raise UserError("reward 'x' cannot be loaded here")
except UserError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)
"""


def test_a_process_that_failed_itself_says_so_where_the_others_are_lost() -> None:
    status, _, errors = finish(start(["-c", FAIL_ALONE], 2))[0]
    assert (status, errors) == (1, "reward 'x' cannot be loaded here\n")


class OnGpu:
    """Stands for a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What one of two processes does on a fake GPU; everything takes a second by a fake clock."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: add("stream")))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: add(type(tensor).__name__))
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(done)))
    add = done.append
    return done


def test_others_are_met_before_a_sum_on_a_gpu(gpu: list[str]) -> None:
    """Only that counts as waiting: not what this process has yet to compute, nor the sum."""
    us = Processes(rank=0, count=2)
    us.sum(OnGpu(), "the gradients of iteration 7")  # type: ignore[arg-type]
    assert gpu == ["stream", "Tensor", "OnGpu"] and us.take_waited_s() == 1.0
    us.sum(torch.ones(1), "a number")
    assert gpu == ["stream", "Tensor", "OnGpu", "Tensor"], "nothing else is sent for a tensor on the CPU"


def test_a_process_lost_before_a_sum_on_a_gpu_is_noticed(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never sent: NCCL would abort the process."""

    def refuse(tensor: object) -> None:
        gpu.append(type(tensor).__name__)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    with pytest.raises(LostError, match="for the gradients of iteration 7 and lost the others"):
        Processes(rank=0, count=2).sum(OnGpu(), "the gradients of iteration 7")  # type: ignore[arg-type]
    assert gpu == ["stream", "Tensor"]


def test_one_process_needs_no_group() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    assert ALONE.gather(3, "") == [3] and ALONE.broadcast("x", "") == "x"
    sum_gradients({"w": weight}, ALONE, "")
    assert weight.grad is None
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


UNPICKLING = re.compile(r"(gather|broadcast|scatter|send|recv)_object(_list)?$|pickle|^torch\.load$")
"""Collectives that send pickles, and what reads them."""
HARMLESS = {
    "tiny/optimise.py": {"torch.load": "with weights_only, of a file that this project has written"},
    "rewards/shipped/models.py": {"torch.load": "with weights_only: tensors alone are read"},
    "evaluation/held_out.py": {"allow_pickle": "it is False, by which numpy refuses pickles"},
}


def names_in(source: str) -> Iterator[str]:
    """Everything that code imports, calls or passes by name."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                yield f"{owner}.{name}"
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.ImportFrom(module=str(name)):
                yield name


def test_nothing_is_unpickled() -> None:
    """Neither what another process sends nor a file: what comes from outside is data."""
    package = Path(__file__).parents[1] / "dgpo_fast"
    found = {
        str(path.relative_to(package)): names
        for path in package.rglob("*.py")
        if (names := {name for name in names_in(path.read_text()) if UNPICKLING.search(name)})
    }
    assert found == {path: set(reasons) for path, reasons in HARMLESS.items()}
    for path in found:
        source = (package / path).read_text()
        assert source.count("torch.load(") == source.count("weights_only=True")
        assert source.count("allow_pickle") == source.count("allow_pickle=False")


@pytest.mark.parametrize(
    "line",
    [
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(a)",
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert any(UNPICKLING.search(name) for name in names_in(line))
