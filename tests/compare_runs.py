"""Plans of comparisons, and what their runs would have written."""

from dataclasses import asdict
from typing import Any

from benchmarks.compare.plan import Plan, next_run
from benchmarks.compare.run import Run
from benchmarks.compare.studies import STUDIES

ALL = STUDIES["paper"].systems


def make_plan(systems: tuple[str, ...] = ALL, seeds: int = 3, trials: int = 5, study: str = "paper") -> Plan:
    return Plan(study, systems, seeds, trials, final_s=100.0, marks=(0.5, 1.0), groups=16)


def result(run: Run, reward: float, patch: float = 4.0, **more: Any) -> dict[str, Any]:
    """What a run would have written that rises from 0.5 to `reward` at half its time, and stays there."""
    if run.kind == "draw":
        return {"run": asdict(run), "source": "offline", "drawing_s": 10.0, "drawing_forwards": 80}
    points = [
        {
            "iteration": round(10 * mark),
            "training_s": mark * run.seconds,
            "training_wall_s": mark * run.seconds,
            "trained_images": round(100 * mark),
            "training_forwards": 1000.0 * mark,
            "distance": 0.01 * mark,
            "sharpness": 30.0,
            "reward_mean": reward,
            "reward_ci95": [reward - 0.1, reward + 0.1],
            "patch_distance": patch,
        }
        for mark in run.marks
    ]
    return {
        "run": asdict(run),
        "points": points,
        "failure": None,
        "out_of_task": {"diversity": 50.0, "signs": 0.3},
        "source": {"drawing_s": 0.0, "drawing_forwards": 0},
        **more,
    }


def carry_out(plan: Plan, reward: Any = lambda run: 0.6) -> tuple[list[Run], dict[str, dict]]:
    """All runs in the order in which one process would do them, and their results."""
    order: list[Run] = []
    results: dict[str, dict] = {}
    while (run := next_run(plan, results, set())) is not None:
        order.append(run)
        results[run.name] = result(run, reward(run))
    return order, results
