"""`dgpo-fast` and `python -m dgpo_fast` list the commands and run each of them, as `python -m dgpo_fast.NAME` does."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dgpo_fast.__main__ import COMMANDS
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.recipe_table import markdown_table
from dgpo_fast.models import loading


def run(*args: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Exit status, output and errors of `python ARGS` in a fresh process in `cwd`."""
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def script(tmp_path: Path) -> str:
    """The console script as pip writes it, in a folder of its own."""
    path = tmp_path / "bin" / "dgpo-fast"
    path.parent.mkdir()
    path.write_text("import sys\nfrom dgpo_fast.__main__ import main\nsys.exit(main())\n")
    return str(path)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(args: list[str], tmp_path: Path) -> None:
    """One line each, that fits a terminal."""
    status, out, errors = run("-m", "dgpo_fast", *args, cwd=tmp_path)
    assert (status, errors) == (0, "")
    listed = [line for line in out.splitlines() if line.startswith("  dgpo-fast ")]
    assert [line.split()[1] for line in listed] == list(COMMANDS)
    assert max(map(len, out.splitlines())) <= 80 and all(len(line.split()) > 3 for line in listed)


def imported(errors: str) -> set[str]:
    """What a process with `-X importtime` imported, by what it wrote to stderr, which must be all that it wrote."""
    lines = errors.splitlines()
    assert all(line.startswith("import time:") for line in lines), errors
    return {line.rsplit("|", 1)[1].strip() for line in lines}


def test_the_list_is_light(script: str, tmp_path: Path) -> None:
    _, out, errors = run("-X", "importtime", script, cwd=tmp_path)
    assert "dgpo-fast train" in out
    assert not {"torch", "diffusers", "numpy", "rich"} & imported(errors)


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """As `head -1`, however soon it is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    command, buffered = [sys.executable, "-m", "dgpo_fast", "recipes"], {**os.environ, "PYTHONUNBUFFERED": ""}
    with os.fdopen(writer) as gone:
        for args in (command[:-1], command):
            done = subprocess.run(
                args, cwd=tmp_path, env=buffered, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60
            )
            assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "recipes"])
def test_help_of_each_command(command: str, script: str, tmp_path: Path) -> None:
    """It comes before the imports that take seconds, and is that of the module."""
    status, out, errors = run("-X", "importtime", script, command, "--help", cwd=tmp_path)
    module = f"dgpo_fast.{command.replace('-', '_')}"
    assert status == 0 and f"\n  python -m {module}" in out and "\n  --" in out
    assert not {"torch", "diffusers"} & imported(errors)
    assert run("-m", module, "--help", cwd=tmp_path) == (0, out, "")


def test_the_table_of_recipes(script: str, tmp_path: Path) -> None:
    for args in ([script, "recipes"], ["-m", "dgpo_fast.recipes"]):
        assert run(*args, cwd=tmp_path) == (0, markdown_table() + "\n", "")
    refusal = "error: command line: unexpected 'tiny-ocr': the table of recipes has no settings\n"
    assert run(script, "recipes", "tiny-ocr", cwd=tmp_path) == (2, "", refusal)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("reward_server", "unknown command 'reward_server': did you mean 'reward-server'?"),
        ("tiny-ocr", f"unknown command 'tiny-ocr': the commands are {', '.join(COMMANDS)}"),
        ("compare", "the comparison moved: run python -m benchmarks.compare in a checkout"),
        ("compare --quick", "the comparison moved: run python -m benchmarks.compare in a checkout"),
        ("train tiny-shape", "unknown recipe 'tiny-shape': did you mean 'tiny-shapes'?"),
        ("evaluate", "command line: name a model or a run's folder, as in `python -m dgpo_fast.evaluate tiny`"),
    ],
)
def test_a_mistake_is_one_line(command: str, line: str, script: str, tmp_path: Path) -> None:
    assert run(script, *command.split(), cwd=tmp_path) == (2, "", f"error: {line}\n")


def test_the_comparison_s_old_spelling(tmp_path: Path) -> None:
    """Alone, and with any arguments that it had."""
    line = "error: the comparison moved: run python -m benchmarks.compare in a checkout\n"
    assert run("-m", "dgpo_fast.compare", "--quick", cwd=tmp_path) == (2, "", line)


def test_own_code_is_found_in_the_working_folder(script: str, tmp_path: Path) -> None:
    """By the console script too, which Python starts with another path than `python -m`."""
    (tmp_path / "my_rewards.py").write_text("def Dark(): raise ValueError('found')\n")
    status, out, errors = run(script, "reward-server", "--reward", "my_rewards:Dark", cwd=tmp_path)
    assert (status, out) == (2, "")
    assert errors == "error: reward 'my_rewards:Dark' cannot be made: ValueError: found (my_rewards.py, line 1)\n"


def test_memory_without_the_hub(tmp_path: Path) -> None:
    """A model whose sizes are known needs none, and no library has a say."""
    unreachable = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    status, out, errors = run("-m", "dgpo_fast.memory", "sd35m-geneval", cwd=tmp_path, **unreachable)
    known, prediction, *table = out.splitlines()
    assert (status, errors) == (0, "")
    assert known == "stabilityai/stable-diffusion-3.5-medium is not downloaded: its sizes are known"
    assert prediction.startswith("predicted memory ") and table[-1].endswith("yes")


def test_what_is_downloaded_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known sizes stand in for a model alone of which nothing is there."""
    config = configure(["sd35m-geneval"])
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *args, **named: None)
    known = loading.known_model(config)
    assert known is not None and known.architecture.transformer["num_layers"] == 24
    assert loading.known_model(replace(config, model="tiny")) is None
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *args, **named: str(tmp_path / "config.json"))
    assert loading.known_model(config) is None
