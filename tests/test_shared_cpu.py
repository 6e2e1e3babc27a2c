"""What makes runs bearable on a CPU that other programs use too, and its measurement."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks import compiling, shared_cpu
from benchmarks.pages import PERFORMANCE, part
from dgpo_fast import spin_count

LOADED_BY_TORCH = re.compile(r"GOMP_SPINCOUNT = '(\w+)'")


def spins(code: str, **set_by_user: str) -> str:
    """What torch's own OpenMP library says of its spinning, in a fresh process that runs `code`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **set_by_user}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = LOADED_BY_TORCH.findall(run.stderr)
    if not found:
        pytest.skip("this torch has another OpenMP library than libgomp")
    return found[0]


def test_waiting_threads_spin_briefly() -> None:
    """Set before torch loads the library, which reads it then; torch alone spins longer."""
    assert spins("import dgpo_fast.train, torch") in ("1000", "3000")
    assert spins("import torch, dgpo_fast.train") not in ("1000", "3000")


@pytest.mark.parametrize(
    ("load", "free", "count"),
    [
        ("0.03 0.60 0.90 1/203 999", 0, "3000"),
        ("1.02 0.40 0.20 2/203 999", 0, "1000"),
        ("0.03 0.02 0.00 3/203 999", 0, "3000"),  # woke up just now
        ("1.90 1.95 1.80 1/203 999", 0, "3000"),  # has just ended
        ("5.10 5.00 4.90 6/990 999", 62, "3000"),  # has cores of its own
    ],
)
def test_it_is_shorter_beside_others(load: str, free: int, count: str) -> None:
    assert spin_count(load, free) == count


@pytest.mark.parametrize(
    "name, value, spun", [("OMP_WAIT_POLICY", "passive", "0"), ("GOMP_SPINCOUNT", "12345", "12345")]
)
def test_what_the_user_has_set_stays(name: str, value: str, spun: str) -> None:
    assert spins("import dgpo_fast, torch", **{name: value}) == spun


def test_the_documents_show_what_was_measured() -> None:
    for module in (shared_cpu, compiling):
        name, result = module.__name__.removeprefix("benchmarks."), module.RESULT
        expected = module.table(json.loads(result.read_text(encoding="utf-8"))) if result.exists() else "not measured"
        assert part(name, PERFORMANCE) == expected


def test_compiling_is_told_from_what_it_saves() -> None:
    """Of 8 iterations with 2 s each, saving 0.5 s, and 5 s more beside them: as long as 250 images of 100 in 2 s."""
    runs = {"off": [{"iteration_s": 2.0, "rest_s": 10.0}], "on": [{"iteration_s": 1.5, "rest_s": 15.0}]}
    report = {"runs": runs, "images_per_iteration": 100}
    assert compiling.summary(report) == {"share": 0.75, "compiling_s": 5.0, "compiling_images": 250.0}
