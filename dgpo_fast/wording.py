"""Phrases that several commands' messages share."""

import difflib
import shlex
from pathlib import Path

FEWEST_PROMPTS = 5
"""Over fewer prompts an interval is as wide as what scores can be: files have it, no table shows it."""
NO_HUB_NAME = ", and no name on the hub (organisation/name)"


def counted(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def number(value: float, places: int = 3, sign: str = "") -> str:
    """A reward as tables show it, `0.564`; from 100,000 on, six digits: `123457`, `1.23457e+09`.

    Args:
        value: any.
        places: after the point.
        sign: "+" gives one to positive values too.
    """
    return f"{value:{sign}.{places}f}" if abs(value) < 1e5 else f"{value:{sign}.6g}"


def resume_command(folder: Path) -> str:
    """What a user types to go on with the run in `folder`."""
    return f"python -m dgpo_fast.train --resume {shlex.quote(str(folder))}"


RUNS_NAMED = 5
"""Most runs that an error names."""


def near_run(folder: str) -> str:
    """`: did you mean runs/colour?`, where a run has a name like that of `folder`, which is none; else nothing."""
    runs = {run.name: run for run in _runs_beside(folder)}
    close = difflib.get_close_matches(Path(folder).name, runs, n=1)
    return f": did you mean {runs[close[0]]}?" if close else ""


def runs_there(folder: str) -> str:
    """`near_run`, or where no name is near, `: there are runs/colour, runs/signs`, the newest first; else nothing."""
    runs = sorted(_runs_beside(folder), key=lambda run: (run / "config.yaml").stat().st_mtime, reverse=True)
    more = f" and {len(runs) - RUNS_NAMED} more" if len(runs) > RUNS_NAMED else ""
    there = ", ".join(map(str, runs[:RUNS_NAMED])) + more
    return near_run(folder) or (f": there {'are' if len(runs) > 1 else 'is'} {there}" if runs else "")


def _runs_beside(folder: str) -> list[Path]:
    """The runs where `folder` would be; of a bare name, those in runs/."""
    path = Path(folder)
    beside = path.parent if len(path.parts) > 1 else Path("runs")
    return [found.parent for found in sorted(beside.glob("*/config.yaml"))]
