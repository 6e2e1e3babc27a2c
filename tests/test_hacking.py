"""`benchmarks/hacking.py`: when the rules fire in the runs that were measured, and what the page says of them."""

import json
from typing import Any

import pytest

from benchmarks import hacking
from benchmarks.pages import part

PATH = hacking.RESULTS / "cpu" / "hacking.json"
RUNS = hacking.current(json.loads(PATH.read_text(encoding="utf-8"))["runs"])


def looks(run: dict[str, Any], every: int) -> list[dict[str, Any]]:
    return [look for look in run["looks"] if look["iteration"] % every == 0]


@pytest.mark.parametrize("every", hacking.EVERY)
def test_healthy_runs_give_no_alarm_and_hacked_ones_in_time(every: int) -> None:
    """In the look in which the watched reward falls below the base's, or before."""
    kinds = set()
    for run in (run for run in RUNS if "+" not in run["run"]):
        alarm = hacking.first_alarm(hacking.unaided(looks(run, every)))
        below = hacking.first_below(looks(run, every), hacking.watched_by(run))
        kinds.add(run["run"])
        if not hacking.KINDS[run["run"]].reward:
            assert alarm is None is hacking.first_alarm(looks(run, every)), (run["run"], run["seed"])
        elif below is not None:
            assert alarm is not None and alarm[0] <= below, (run["run"], run["seed"])
    assert {"healthy", "bright", "edges"} <= kinds


def test_the_page_has_the_tables_of_the_results() -> None:
    assert part("hacking", hacking.PAGE) == hacking.alarm_table(RUNS)
    assert part("hacking --table", hacking.PAGE) == hacking.defence_table(RUNS)
