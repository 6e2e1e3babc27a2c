"""An iteration that breaks off, as where another process is lost: what is saved of it, and what its metrics say."""

from pathlib import Path

import pytest

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.trainer import Trainer


def break_off(workspace: Path, monkeypatch: pytest.MonkeyPatch, where: str, part: str = "") -> tuple[list[int], int]:
    """Iterations in the metrics, and that of the newest checkpoint, of a run whose second iteration ends in `where` of
    the trainer's `part`."""
    trainer = Trainer(build(configure(["small.yaml"])))
    trainer.open_logs(workspace, {})
    trainer.console.start_training(0, 6)
    trainer.step()
    trainer.save(workspace)

    def lost(*_: object) -> None:
        raise UserError("lost the others")

    monkeypatch.setattr(getattr(trainer, part) if part else trainer, where, lost)
    with pytest.raises(UserError, match="lost the others"):
        trainer.step()
    trainer.save(workspace)
    trainer.close()
    iterations = [line["iteration"] for line in read_metrics(workspace / "metrics.jsonl")]
    return iterations, load_newest(workspace / "checkpoints")[0].iteration


@pytest.mark.parametrize("where", ["_sum", "average"])
def test_moved_weights_without_their_averages_are_not_saved(
    where: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the optimizer's step and the iteration's end."""
    assert break_off(workspace, monkeypatch, where, "learner") == ([1], 1)


@pytest.mark.parametrize(("where", "part"), [("_compare_processes", ""), ("take", "phases")])
def test_a_finished_iteration_is_saved_and_logged(
    where: str, part: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its weights and averages have moved, a checkpoint of it has its line in the metrics."""
    assert break_off(workspace, monkeypatch, where, part) == ([1, 2], 2)
