"""The documents say what the code does."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare.report import with_parts
from benchmarks.compare.studies import STUDIES
from benchmarks.pages import part
from dgpo_fast.config.command_line import configure, take_option
from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import flat
from dgpo_fast.config.recipe_table import markdown_table, short_table
from dgpo_fast.config.resuming import markdown_table as resuming_table
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import take_sources
from dgpo_fast.evaluation.settings import read_settings
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import load_rewards
from tests.processes import run_alone

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_recipes_are_shown_as_they_are() -> None:
    """All in docs/recipes.md, as `python -m dgpo_fast.recipes` prints them; the most used ones in the README."""
    assert markdown_table() in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert short_table() in README, f"the README's table should be\n{short_table()}"


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150


def test_readme_commands_are_understood() -> None:
    commands = re.findall(r"python -m dgpo_fast\.train([^\n#`\"]*)", README)
    assert len(commands) > 5
    for command in commands:
        args = command.split()
        if "--help" not in args and "--resume" not in args and "my_settings.yaml" not in args:
            configure(args)


def test_evaluation_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_sd3").mkdir()
    for name in ("NAME", "A", "B"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("recipe: tiny-shapes\n")
    texts = [README, (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")]
    commands = [found for text in texts for found in re.findall(r"python -m dgpo_fast\.evaluate([^\n#`]*)", text)]
    assert len(commands) > 8
    for command in commands:
        args = command.split()
        sources = take_sources(args) if "--side-by-side" in args else [args.pop(0)]
        take_option(args, "output")
        for source in sources:
            assert source == "--help" or read_settings([source, *args])


def test_settings_named_in_the_docs_exist() -> None:
    names = set(flat(Config()))
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for group, field in re.findall(
            r"`(rollout|dgpo|policy|engine|optimizer|ema|evaluation|checkpoint)\.(\w+)`",
            path.read_text(encoding="utf-8"),
        ):
            assert field in ("py", "yaml") or f"{group}.{field}" in names, f"{path.name}: {group}.{field}"


def test_the_documented_use_of_metadata_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward in docs/rewards.md that reads a prompt's line, on the line that the page shows."""
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    found = re.search(r"as `(\{.*?\})`.*?```python\n(.*?)```", page, re.DOTALL)
    assert found
    (tmp_path / "channel_rewards.py").write_text(found[2])
    monkeypatch.syspath_prepend(tmp_path)
    prompt, bare = Prompt("a wall", json.loads(found[1])), Prompt("a wall", {}, "my.jsonl:2")
    reward = load_rewards(["channel_rewards:Channel"])
    reward.check_prompts([prompt])
    with pytest.raises(
        UserError, match=r'^my\.jsonl:2: give "channel", which is 0 \(red\), 1 \(green\) or 2 \(blue\)$'
    ):
        reward.check_prompts([prompt, bare])
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1, ..., 0] = 255
    assert reward.score_groups(images, [prompt], 2).rewards.tolist() == [[0.0, 1.0]]


def test_what_may_change_in_a_resumed_run_is_documented() -> None:
    text = (ROOT / "docs/recipes.md").read_text("utf-8")
    assert resuming_table() in text, f"the table should be\n{resuming_table()}"


def test_links_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_files_and_modules_named_in_the_documents_exist() -> None:
    """Files by their path in the checkout or in a package; those that a reader may write have `my_` or NAME in them."""
    homes = (ROOT, ROOT / "dgpo_fast", ROOT / "kernels/dgpo_kernels")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("docs/*.md")]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`([\w/.]+\.(?:py|sh))`|(?:python|bash) ([\w/.]+\.(?:py|sh))\b", text):
            file = "".join(name)
            made_up = file.startswith("my_") or "NAME" in file
            assert made_up or any((home / file).is_file() for home in homes), f"{path.name}: {file}"
        for module in re.findall(r"-m ((?:dgpo_fast|dgpo_kernels|benchmarks)[\w.]*\w)", text):
            assert importlib.util.find_spec(module), f"{path.name}: {module}"


def test_the_readme_s_tree_is_the_package_s() -> None:
    """Every room of the package, and nothing that is not there."""
    (tree,) = re.findall(r"```\n(dgpo_fast/\n.*?)```", README, re.DOTALL)
    names = [name for line in re.findall(r"^  (\S.*?)(?:  |$)", tree, re.MULTILINE) for name in line.split()]
    named = {name.rstrip("/") for name in names if name != "…"}
    there = {path.name for path in (ROOT / "dgpo_fast").iterdir()}
    rooms = {path.parent.name for path in (ROOT / "dgpo_fast").glob("*/__init__.py")}
    assert rooms <= named <= there, (rooms - named, named - there)
    outside = [name for line in tree.splitlines() if not line.startswith(" ") for name in line.split("  ")[0].split()]
    assert len(outside) > 4 and all((ROOT / name).is_dir() for name in outside), outside


def test_readme_results_are_those_of_the_file() -> None:
    """The table of the default run holds the numbers that `benchmarks/first_light.py` wrote."""
    report = json.loads((ROOT / "benchmarks/results/cpu/tiny-shapes.json").read_text(encoding="utf-8"))
    for run in report["runs"]:
        cells = []
        for scores in (run["before"], run["after"]):
            cells.append(
                f"{scores['reward_mean']:.3f} ± {(scores['reward_ci95'][1] - scores['reward_ci95'][0]) / 2:.3f}"
            )
        gain = run["gain"]
        cells.append(f"{gain['reward_mean']:+.3f} ± {(gain['reward_ci95'][1] - gain['reward_ci95'][0]) / 2:.3f}")
        row = f"| {run['seed']} | {' | '.join(cells)} | {run['wall_s']:.0f} s |"
        assert row in README, row


def test_the_model_of_communication_is_the_script_s() -> None:
    """Made by `python benchmarks/scaling.py`."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/scaling.py")], capture_output=True, text=True)
    assert done.stdout and done.stdout in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_the_tables_of_speed_are_those_of_the_results() -> None:
    """Made by `python benchmarks/throughput.py tables`."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.throughput_tables import with_tables
    finally:
        sys.path.remove(str(ROOT))
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert text.count("<!-- throughput") >= 6
    assert with_tables(text, ROOT / "benchmarks/results") == text


def test_the_comparison_shows_its_results() -> None:
    """Figures, tables and findings in docs/comparison.md are those that `python -m benchmarks.compare` wrote."""
    results, document = ROOT / "benchmarks/results/cpu/compare", ROOT / "docs/comparison.md"
    text = document.read_text(encoding="utf-8")
    for study in STUDIES:
        if (results / study).exists():
            assert with_parts(document, results / study) == text
        else:
            shown = re.findall(rf"<!-- compare: {study} \w+ -->(.*?)<!-- end -->", text, re.S)
            assert {part.strip() for part in shown} <= {"", "Not measured yet."}, "no results without their files"


@pytest.mark.parametrize("script", ["faults", "nodes", "kills"])
def test_the_faults_are_those_of_the_files(script: str) -> None:
    """The parts of docs/scaling.md that `python -m benchmarks.faults`, `nodes` and `kills` wrote; all ended well."""
    module = importlib.import_module(f"benchmarks.{script}")
    assert part(script) == module.text(module.written())
    assert module.as_documented(module.written())


def test_the_readme_quotes_the_comparison() -> None:
    """The sentence on Flow-GRPO has the numbers of `python -m benchmarks.compare`."""
    report = json.loads((ROOT / "benchmarks/results/cpu/compare/paper/compare.json").read_text(encoding="utf-8"))
    findings = report["findings"]
    numbers = findings[0]["numbers"]
    low, high = numbers["ratio_interval"]
    quoted = f"{numbers['ratio']:.1f} times sooner (95 % of resampled seeds: {low:.1f} to {high:.1f}), and online data"
    assert quoted in " ".join(README.split())
    assert [finding["verdict"] for finding in findings[:4]] == ["holds"] * 4


def test_the_readme_quotes_the_signs() -> None:
    """As `python benchmarks/first_light.py tiny-ocr --seeds 0` wrote them."""
    (run,) = json.loads((ROOT / "benchmarks/results/cpu/tiny-ocr.json").read_text(encoding="utf-8"))["runs"]
    before, after = (run[when]["reward_mean"] for when in ("before", "after"))
    assert run["after"]["reward_ci95"][0] - run["before"]["reward_ci95"][1] > 0.15 and run["wall_s"] < 1200
    assert f"goes from {before:.3f} to {after:.3f} in {run['wall_s']:.0f} s" in README


@pytest.mark.parametrize(
    ("script", "document", "lines"),
    [
        ("comparison_reasons.py", "comparison.md", 29),
        ("gradient_signal.py", "comparison.md", 13),
        ("gradient_choices.py", "method.md", 9),
        ("rounding.py", "performance.md", 10),
        ("first_light.py", "hyperparameters.md", 41),
        ("first_light.py tiny-ocr", "hyperparameters.md", 7),
    ],
)
def test_tables_are_those_of_their_scripts(script: str, document: str, lines: int) -> None:
    """What `python benchmarks/SCRIPT --table` prints."""
    name, *recipe = script.split()
    table = run_alone([str(ROOT / "benchmarks" / name), *recipe, "--table"])
    assert table.count("\n") == lines
    assert table in (ROOT / "docs" / document).read_text(encoding="utf-8")
