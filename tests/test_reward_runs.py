"""Rewards inside whole runs on the shipped pipeline: chosen per prompt, failing, and gone."""

import json
from pathlib import Path

import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.metrics import read_metrics
from dgpo_fast.tiny import data
from dgpo_fast.train import train

# A run of four pictures an iteration that takes about a second.
SMALL = [
    "--name=run", "--iterations=3", "--rollout.groups=4", "--rollout.group-size=2", "--rollout.num-inference-steps=2",
    "--dgpo.timesteps=1", "--dgpo.high-noise-steps=2", "--evaluation.images=8", "--evaluation.num-inference-steps=2",
]  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_mixed_run_of_shapes_and_signs(workspace: Path) -> None:
    """Each prompt is scored by the reward that its metadata names, and each reward has a mean of its own."""
    shapes = [{**metadata, "reward": "shapes"} for _, metadata in data.shape_prompts("train")[:20]]
    signs = [{**metadata, "reward": "ocr"} for _, metadata in data.sign_prompts("train")[:20]]
    (workspace / "mixed.jsonl").write_text("\n".join(map(json.dumps, shapes + signs)))
    assert train(["--prompts", "mixed.jsonl", "--rewards", "shapes", "ocr=0.5", *SMALL]) == 0
    lines = read_metrics(workspace / "runs/run/metrics.jsonl")
    assert all(line["groups_dropped_count"] == 0 for line in lines)
    for name in ("shapes", "ocr"):
        assert any(line[f"reward/{name}_mean"] is not None for line in lines), name
    summary = json.loads((workspace / "runs/run/summary.json").read_text())
    assert summary["after"]["images"] == 8 and "ocr" in summary["after"]["tags"]


def test_an_unknown_choice_is_refused_before_the_run(workspace: Path) -> None:
    (workspace / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "reward": "ocr"}\n')
    with pytest.raises(UserError, match=r"^p\.jsonl:2: no reward 'ocr' in this run: use jpeg, or add it to --rewards$"):
        train(["--prompts", "p.jsonl", "--rewards", "jpeg", *SMALL])
    assert not (workspace / "runs").exists()
