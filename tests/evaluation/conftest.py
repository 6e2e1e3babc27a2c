"""The working folder of these tests."""

from pathlib import Path

import pytest

from tests.evaluation.cases import PROMPTS


@pytest.fixture
def workspace(tmp_path: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the pipeline `model` and six prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(random_pipeline)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return tmp_path
