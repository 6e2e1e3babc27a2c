"""Run folders that a message can name."""

import difflib
from pathlib import Path

RUNS_NAMED = 5
"""Most runs that an error names."""


def near_run(folder: str) -> str:
    """`: did you mean runs/colour?`, if a run has a name like that of `folder`, which is none; else nothing."""
    runs = {run.name: run for run in _runs_beside(folder)}
    close = difflib.get_close_matches(Path(folder).name, runs, n=1)
    return f": did you mean {runs[close[0]]}?" if close else ""


def runs_there(folder: str) -> str:
    """`near_run`, or if no name is near, `: there are runs/colour, runs/signs`, the newest first; else nothing."""
    runs = sorted(_runs_beside(folder), key=lambda run: (run / "config.yaml").stat().st_mtime, reverse=True)
    more = f" and {len(runs) - RUNS_NAMED} more" if len(runs) > RUNS_NAMED else ""
    there = ", ".join(map(str, runs[:RUNS_NAMED])) + more
    return near_run(folder) or (f": there {'are' if len(runs) > 1 else 'is'} {there}" if runs else "")


def _runs_beside(folder: str) -> list[Path]:
    """The runs where `folder` would be; of a bare name, those in runs/."""
    path = Path(folder)
    beside = path.parent if len(path.parts) > 1 else Path("runs")
    return [found.parent for found in sorted(beside.glob("*/config.yaml"))]
