"""`python -m benchmarks.another_family`: a small Z-Image, pretrained and reinforced, at a tiny budget."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import another_family
from benchmarks.pages import DOCS, part
from dgpo_fast.tiny import data

BUDGET = ["--pictures", "16", "--transformer-steps", "2", "--transformer-batch", "4"]
RUN = [
    *("--iterations", "1", "--rollout.groups", "2", "--rollout.group-size", "2", "--rollout.num-inference-steps", "2"),
    *("--dgpo.timesteps", "1", "--dgpo.high-noise-steps", "1", "--evaluation.num-inference-steps", "1"),
    *("--evaluation.images", "6", "--engine.linear", "torch", "--engine.attention", "native"),
]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["another_family", *arguments])
    return another_family.main()


def test_pretrained_then_reinforced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh process trains on the folder that pretraining saved; what is finished is not run again."""
    work, result = tmp_path / "work", tmp_path / "result.json"
    pretrain = ["pretrain", "--work", str(work), *BUDGET]
    assert call(monkeypatch, *pretrain) == 0
    written = (work / "transformer.pt").read_bytes()
    assert call(monkeypatch, *pretrain[:-1], "8") == 2
    assert "made with another transformer_batch" in capsys.readouterr().err
    assert (work / "transformer.pt").read_bytes() == written

    train = ["train", "--work", str(work), "--result", str(result), "--seeds", "3", *RUN]
    assert call(monkeypatch, *train) == 0
    report = json.loads(result.read_text())
    (run,) = report["runs"]
    assert run["seed"] == 3 and run["gain"]["images"] == 6
    assert report["pretraining"]["config"]["transformer_steps"] == 2
    assert "| Z-Image, pretrained here | 3 | 1 |" in another_family.table(report)
    monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
    assert call(monkeypatch, *train) == 0
    assert json.loads(result.read_text())["runs"] == [run]


def test_words_are_tokens_and_are_learnt() -> None:
    """Each word of a caption gets a gradient from the pretraining's loss, and so does the end of a dropped one."""
    pipe, config = another_family.build_pipeline(0), another_family.PRETRAINING
    for text, _ in data.all_prompts():
        assert len(pipe.tokenizer(text).input_ids) == len(text.split()) < another_family.TEXT_TOKENS
    with torch.no_grad():  # it starts with gates of 0
        for p in pipe.transformer.parameters():
            p.add_(0.02)
    prompts = data.all_prompts()[:1]
    stage = another_family.transformer_stage(pipe, prompts, torch.zeros(1, 12, 8, 8), config)
    stage.loss(*(rows[:8] for rows in stage.draw(torch.Generator().manual_seed(0)))).backward()
    learnt = pipe.text_encoder.embed_tokens.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert set(learnt.tolist()) == set(pipe.tokenizer(f"{prompts[0][0]}<|endoftext|>").input_ids)


def test_the_documents_have_the_results() -> None:
    """As the command `table` wrote them."""
    report = json.loads(another_family.RESULT.read_text(encoding="utf-8"))
    assert part("another_family", DOCS / "families.md") == another_family.table(report)
    assert len(report["runs"]) > 1


def test_the_results_show_that_it_learns() -> None:
    """The whole interval of each seed's gain lies above 0."""
    for run in json.loads(another_family.RESULT.read_text(encoding="utf-8"))["runs"]:
        low, high = run["gain"]["reward_ci95"]
        assert 0 < low < run["gain"]["reward_mean"] < high
