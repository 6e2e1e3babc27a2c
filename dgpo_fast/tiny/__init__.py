"""The shipped small pipeline and its miniature world: data, pretraining, rewards."""

from pathlib import Path

PIPELINE_DIR = Path(__file__).parent / "pipeline"
