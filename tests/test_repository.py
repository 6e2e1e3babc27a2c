"""The files around the code: what they promise is what the README and the package say."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import dgpo_fast

ROOT = Path(__file__).parents[1]
YAML = (
    ".github/workflows/ci.yml",
    ".github/ISSUE_TEMPLATE/bug.yml",
    ".github/ISSUE_TEMPLATE/config.yml",
    ".github/ISSUE_TEMPLATE/idea.yml",
    ".pre-commit-config.yaml",
    "CITATION.cff",
)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(name: str) -> Any:
    return yaml.safe_load(text(name))


def install_commands(page: str) -> list[str]:
    """The lines of a page that install the package and go on."""
    return re.findall(r'^pip install -e (?:\.|"\.\[test\]") && .*', page, re.MULTILINE)


def checks() -> list[str]:
    """What the README's test command runs after the installation."""
    (command,) = [line for line in install_commands(text("README.md")) if "[test]" in line]
    return command.split(" && ")[1:]


@pytest.mark.parametrize("name", YAML)
def test_yaml_files_are_read(name: str) -> None:
    assert parsed(name)


def test_no_yaml_file_is_forgotten() -> None:
    assert {str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.y*ml")} <= set(YAML)


def test_the_workflow_runs_the_readme_s_commands() -> None:
    jobs = parsed(".github/workflows/ci.yml")["jobs"].values()
    run = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert sorted(run) == sorted(install_commands(text("README.md"))) and len(run) == 2


def test_the_workflow_has_the_lowest_python() -> None:
    lowest = importlib.metadata.metadata("dgpo_fast")["Requires-Python"].removeprefix(">=")
    assert text(".github/workflows/ci.yml").count(f'python-version: "{lowest}"') == 2


def test_hooks_are_the_readme_s_quick_checks() -> None:
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "hooks that need no network"
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert entries == [check.removesuffix(" --check") for check in checks() if not check.startswith("pytest")]


def test_a_bug_is_told_with_command_output_and_versions() -> None:
    fields = {field["id"]: field for field in parsed(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    required = {name for name, field in fields.items() if field.get("validations", {}).get("required")}
    assert {"command", "output", "versions"} <= required


def test_the_guide_s_checks_are_the_readme_s() -> None:
    assert f"```bash\n{' && '.join(checks())}\n```" in text("CONTRIBUTING.md")


def test_the_functions_and_tables_that_the_guide_names_are_there() -> None:
    files = [path for folder in ("dgpo_fast", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"`(test_\w+|[A-Z_]{3,}|_FUNCTIONS|stream_seed)`", text("CONTRIBUTING.md"))) - {"NAME"}
    assert len(named) > 6
    for name in named:
        assert re.search(rf"^(?:def )?{name}\b", code, re.MULTILINE), name


def test_a_change_is_asked_for_the_readme_s_checks_and_proof() -> None:
    template = text(".github/pull_request_template.md")
    assert f"`{' && '.join(checks())}`" in template and "python -m benchmarks.same_metrics" in template


def test_versions_agree() -> None:
    citation = parsed("CITATION.cff")
    assert citation["version"] == dgpo_fast.__version__
    newest = re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)
    assert newest and newest[1].strip("[]") == dgpo_fast.__version__
    (paper,) = citation["references"]
    assert paper["url"] in text("README.md") and paper["identifiers"][0]["value"].removeprefix("arXiv:") in paper["url"]


def test_the_new_paths_of_the_changelog_are_there() -> None:
    rows = re.findall(r"^  \| `dgpo_fast.*?\| (`dgpo_fast.*) \|$", text("CHANGELOG.md"), re.MULTILINE)
    modules = re.findall(r"`(dgpo_fast[\w.]*)`", "".join(rows))
    assert len(rows) > 3 and all(importlib.util.find_spec(module) for module in modules)
