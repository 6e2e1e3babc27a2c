"""Checkpoints as a run writes them."""

from pathlib import Path

from dgpo_fast.run.checkpoint import CheckpointWriter, Parts


def save_checkpoint(folder: Path, iteration: int, parts: Parts, keep: int) -> Path:
    """Writes a checkpoint of `parts` and waits for it."""
    writer = CheckpointWriter(folder, keep, {})
    writer.save(iteration, parts)
    writer.wait()
    return folder / f"iteration-{iteration:06d}"
