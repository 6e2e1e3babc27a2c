"""What tests of whole runs share: their command and their metrics."""

import sys
from pathlib import Path

from dgpo_fast.run.metrics import read_metrics


def untimed(folder: Path) -> list[dict]:
    """The metrics that do not depend on the clock."""
    clock = ("_s", "_per_s", "_mib", "_tflops", "_percent")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in read_metrics(folder / "metrics.jsonl")]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "dgpo_fast.train", *args]
