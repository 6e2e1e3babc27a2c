"""`benchmarks/on_a_gpu.sh`, run with stand-ins for `python3` and `timeout`: what it calls, in which order, and what it
leaves behind. And that all it calls is there and takes what it is given."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import first_light, gpu_questions, kernels, throughput
from benchmarks.throughput import Bench
from dgpo_fast.profiling.command import read_plan
from dgpo_fast.rewards import load_rewards
from tests.processes import run_alone

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/on_a_gpu.sh"
STEPS = (
    *("noise", "rates", "attention", "blocks", "group_kernel", "throughput", "kernels", "smoke", "profile", "changes"),
    *("cases", "savings", "tests", "float8", "tune", "first_light", "sanitizer"),
)
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
name, args, out = pathlib.Path(sys.argv[0]).name, sys.argv[1:], pathlib.Path(os.environ["OUT"])
if args[:1] == ["-c"]:
    sys.exit(int("cuda" in args[1] and os.environ.get("NO_GPU", 0)))
packed = out / "results.tgz"
kept = subprocess.check_output(["tar", "tzf", packed], text=True).split() if packed.exists() else []
caches = [os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
with open("log.jsonl", "a") as file:
    print(json.dumps({{"program": name, "args": args, "kept": kept, "caches": caches}}), file=file)
if name == "timeout":
    late = int(args[1]) == int(os.environ.get("LATE", 0))
    sys.exit(124 if late else subprocess.call(args[2:]))
count = len(list(pathlib.Path("benchmarks/results/gpu").iterdir()))
pathlib.Path(f"benchmarks/results/gpu/{{count}}.json").touch()
if "dgpo_fast.profile" in args:
    folder = pathlib.Path("runs/gpu_profile")
    folder.mkdir(parents=True)
    for file in ("report.html", "report.json"):
        (folder / file).touch()
print("said", *args)
sys.exit(int(os.environ.get("FAILING", "nothing") in args))
"""


def run(folder: Path, *steps: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The script in a checkout of its own with nothing else in it, and what it called there."""
    (folder / "benchmarks").mkdir(exist_ok=True)
    shutil.copy(SCRIPT, folder / "benchmarks")
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("python3", "timeout"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in ("OUT", "CACHES", "MINUTES")}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(folder / "benchmarks/on_a_gpu.sh"), *steps]
    done = subprocess.run(command, env={**clean, "PATH": path, **environment}, capture_output=True, text=True)
    log = folder / "log.jsonl"
    calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done, calls


def steps_of(done: subprocess.CompletedProcess[str]) -> list[tuple[str, int]]:
    """Names and limits in seconds."""
    return [(name, int(limit)) for name, limit in re.findall(r"^== (\w+), (\d+) s at most", done.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[dict[str, Any]]]:
    """All steps."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def test_steps_come_cheapest_first_within_the_limits_stated(whole: Any) -> None:
    """The first questions of a GPU before anything long, each under `timeout` with the limit that is said."""
    _, done, calls = whole
    assert done.returncode == 0, done.stderr
    steps = steps_of(done)
    assert [name for name, _ in steps] == list(STEPS)
    limits = [call["args"][:2] for call in calls if call["program"] == "timeout"]
    assert limits == [["--kill-after=10", str(seconds)] for _, seconds in steps]
    text = SCRIPT.read_text(encoding="utf-8")
    (minutes,) = re.findall(r"together they are (\d+) minutes", text)
    assert int(minutes) == round(sum(seconds for _, seconds in steps) / 60)
    seconds_of = dict(steps)
    first = [line.split() for line in re.findall(r"^#     bash benchmarks/on_a_gpu.sh (\w.*)$", text, re.MULTILINE)]
    totals = [sum(seconds_of[name] for name in names) for names in first]
    assert [name for names in first for name in names] == list(STEPS[: sum(map(len, first))])
    assert all(total < 600 for total in totals) and sum(totals) < 1800


def test_results_are_packed_after_each_step(whole: Any) -> None:
    folder, _, calls = whole
    kept = [len([name for name in call["kept"] if name.endswith(".json")]) for call in calls]
    steps = [count for call, count in zip(calls, kept, strict=True) if call["program"] == "timeout"]
    assert steps[0] == 0 and steps[: STEPS.index("profile") + 1] == list(range(STEPS.index("profile") + 1))
    assert sorted(path.name for path in (folder / "runs/on_a_gpu").iterdir()) == ["output.txt", "results.tgz"]
    assert "said -m benchmarks.gpu_questions rates" in (folder / "runs/on_a_gpu/output.txt").read_text()


def test_compiled_code_is_carried_from_step_to_step(whole: Any, tmp_path: Path) -> None:
    """In the folder that is said, or in the one given."""
    folder, _, calls = whole
    assert {tuple(call["caches"]) for call in calls} == {
        tuple(str(folder / "runs/gpu_caches" / name) for name in ("inductor", "triton"))
    }
    _, calls = run(tmp_path, "rates", CACHES=str(tmp_path / "mine"), OUT=str(tmp_path / "out"))
    assert calls[-1]["caches"] == [str(tmp_path / "mine" / name) for name in ("inductor", "triton")]
    assert (tmp_path / "out/results.tgz").exists()


def test_a_step_that_fails_is_named_and_stops_no_other(tmp_path: Path) -> None:
    """One fails, and one runs out of its time."""
    named = ["rates", "attention", "blocks"]
    done, _ = run(tmp_path, *named, FAILING="rates", LATE="200")
    assert done.returncode == 1 and [name for name, _ in steps_of(done)] == named
    assert "== rates: status 1 after" in done.stdout and "== attention: status 124 after" in done.stdout
    assert done.stdout.endswith("failed: rates attention\n")
    assert (tmp_path / "runs/on_a_gpu/output.txt").read_text().endswith("failed: rates attention\n")


@pytest.mark.parametrize(
    ("steps", "no_gpu", "line"),
    [
        (["rates", "rate"], "0", f"error: no step 'rate'; there are {' '.join(STEPS)}\n"),
        (["rates"], "1", "error: torch finds no CUDA GPU here\n"),
    ],
)
def test_nothing_is_begun_that_cannot_be_done(steps: list[str], no_gpu: str, line: str, tmp_path: Path) -> None:
    done, calls = run(tmp_path, *steps, NO_GPU=no_gpu)
    assert (done.returncode, done.stderr, calls) == (2, line, [])


def test_what_it_calls_takes_what_it_is_given(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command but pytest's, by its own reading of its arguments."""
    _, _, calls = whole
    commands = [call["args"] for call in calls if call["program"] == "python3"]
    monkeypatch.chdir(tmp_path)
    checked = 0
    for program, *args in (
        [" ".join(command[:2]), *command[2:]] if command[0] == "-m" else command for command in commands
    ):
        if program == "-m pytest":
            continue
        checked += 1
        if program == "-m dgpo_fast.profile":
            plan = read_plan(args)
            load_rewards(plan.config.rewards)
            assert str(plan.folder) == "runs/gpu_profile"
        elif program == "-m benchmarks.gpu_questions":
            assert gpu_questions.parser().parse_args(args).questions == args
        elif program == "benchmarks/throughput.py":
            given, settings = throughput.options(args)
            assert given.what == "run" and not settings and all(rows_with(text) for text in given.only), args
        elif program == "benchmarks/kernels.py":
            assert set(args) <= kernels.STEPS
        else:
            assert program == "benchmarks/first_light.py"
            recipe, seed, _, settings = first_run(args, tmp_path, monkeypatch)
            assert (recipe, seed, settings) == ("tiny-shapes", 0, [])
    assert checked == len(STEPS) - len([command for command in commands if "pytest" in command])


def first_run(args: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What `first_light.py` would run first."""
    begun: list[tuple[Any, ...]] = []

    def run(*given: Any) -> None:
        begun.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["first_light.py", *args])
    monkeypatch.setattr(first_light, "RESULTS", folder)
    monkeypatch.setattr(first_light, "run", run)
    with pytest.raises(KeyboardInterrupt):
        first_light.main()
    return begun[0]


def rows_with(text: str) -> list[str]:
    """Rows that `throughput.py` measures on a GPU and that contain `text`."""
    bench = Bench("cuda", groups=1, rounds=1, minutes=1, only=[], path=Path())
    labels: list[str] = []
    bench.row = lambda section, name, measure: labels.append(f"{section}: {name}")  # type: ignore[method-assign]
    bench.run()
    return [label for label in labels if text in label]


COLLECT = """
import json, sys, pytest
statuses = [pytest.main(["--collect-only", "-q", *args]) for args in json.loads(sys.argv[1])]
sys.exit(any(statuses))
"""


def test_the_tests_that_it_runs_are_there(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each selection of pytest has tests in it; without files named, those of the kernels are."""
    _, _, calls = whole
    commands = [call["args"][2:] for call in calls if call["args"][:2] == ["-m", "pytest"]]
    assert len(commands) == 4
    named = [any(arg.endswith(".py") for arg in args) for args in commands]
    kernels = "tests/kernels/test_kernels_cuda.py"
    selections = [args if files else [*args, kernels] for args, files in zip(commands, named, strict=True)]
    monkeypatch.chdir(ROOT)
    run_alone(["-c", COLLECT, json.dumps(selections)])
