"""What is done in which order, and how long each run trains, as functions of what is finished."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.compare.run import Run
from benchmarks.compare.studies import STUDIES
from benchmarks.compare.systems import SYSTEMS
from dgpo_fast.errors import UserError

SEARCH_SEED, SEARCH_EVALUATION_SEED = 1000, 1
SEARCH_SHARE = 0.4
LR_STEP = 2.5
RATES = (1.0, LR_STEP, 1 / LR_STEP)
"""First learning rates that are tried, over the one in the middle."""
OWN_STEP = 4.0
"""How far a system's own setting is moved, up and down."""
WITHOUT_OWN = 5
"""Trials of learning rates and groups."""
SPARE = 0.96
"""Share of the time that is planned for: the rest is for starting processes and writing figures."""

Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """The comparison's runs.

    Attributes:
        study: its name.
        systems: names of the systems.
        seeds: final runs of each system.
        trials: settings tried for each system, 1 to 7.
        final_s: training seconds of a final run, times its system's patience; a tried setting trains for
            `SEARCH_SHARE` of it.
        marks: shares of these seconds after which a final run is evaluated.
        groups: groups per iteration, unless the search finds another number better.
    """

    study: str
    systems: tuple[str, ...]
    seeds: int
    trials: int
    final_s: float
    marks: tuple[float, ...]
    groups: int

    @property
    def size(self) -> int:
        """How many runs there are."""
        return len(self.draws) + len(self.systems) * (self.trials + self.seeds)

    @property
    def draws(self) -> list[Run]:
        """The data of the offline systems, drawn once for each seed."""
        offline = [name for name in self.systems if SYSTEMS[name].offline]
        return [draw_run(seed, self.groups) for seed in (SEARCH_SEED, *range(self.seeds))] if offline else []

    def trial(self, system: str, lr: float, groups: int) -> Run:
        """A run that tries a setting."""
        seconds = SEARCH_SHARE * self.seconds(system)
        return Run("search", system, SEARCH_SEED, lr, groups, seconds, (1.0,), SEARCH_EVALUATION_SEED)

    def final(self, system: str, seed: int, chosen: Run) -> Run:
        """A run with the setting that was chosen."""
        seconds = self.seconds(system)
        return replace(chosen, kind="final", seed=seed, seconds=seconds, marks=self.marks, evaluation_seed=0)

    def seconds(self, system: str) -> float:
        """Training seconds of a final run of `system`."""
        return self.final_s * self.patience(system)

    def patience(self, system: str) -> float:
        """How many times as long as the others' its runs are."""
        return STUDIES[self.study].patience.get(system, 1.0)

    @property
    def training_s(self) -> float:
        """Training seconds of all runs together."""
        each = SEARCH_SHARE * self.trials + self.seeds
        return each * sum(map(self.seconds, self.systems))


def base_run(groups: int) -> Run:
    """The model as it came; its seconds are those of evaluations, from which the plan is made."""
    return Run("base", "dgpo", 0, 1e-4, groups)


def finished_seeds(plan: Plan, results: Results) -> int:
    """How many seeds all systems have done, from the first one on."""
    chosen = {system: choose(plan, system, results) for system in plan.systems}

    def is_done(seed: int) -> bool:
        return all(run is not None and plan.final(name, seed, run).name in results for name, run in chosen.items())

    return next((seed for seed in range(plan.seeds) if not is_done(seed)), plan.seeds)


def draw_run(seed: int, groups: int) -> Run:
    """The data of the offline systems for one seed."""
    return Run("draw", "dgpo-offline", seed, 1e-4, groups)


def fitted(plan: Plan, budget_s: float, processes: int, base: Mapping[str, Any], draw_s: float) -> Plan:
    """`plan` with runs as long as `budget_s` allows.

    Args:
        plan: what is to be done.
        budget_s: for everything, on the wall.
        processes: runs at a time.
        base: result of the base run: the seconds of setting up and of evaluations.
        draw_s: seconds in which the offline systems' data is drawn for one seed.

    Raises UserError if that leaves less than a second for a run.
    """
    searches, finals = len(plan.systems) * plan.trials, len(plan.systems) * plan.seeds
    per_search = base["set_up_s"] + base["evaluation_s"]
    per_final = base["set_up_s"] + len(plan.marks) * base["evaluation_s"] + base["out_of_task_s"]
    beside = searches * per_search + finals * per_final + len(plan.draws) * (draw_s + base["set_up_s"])
    left = SPARE * budget_s * processes - beside
    # How many times `final_s` all training together is.
    times = replace(plan, final_s=1.0).training_s
    final_s = left / times
    if final_s < 1:
        least = (beside + times) / (SPARE * processes) / 60
        raise UserError(f"--minutes {budget_s / 60:.3g} leaves no time to train: give at least {least:.2g}")
    return replace(plan, final_s=round(final_s, 1))


def wanted(plan: Plan, results: Results) -> Iterator[Run]:
    """Runs that can be done now or are done, the most urgent first."""
    systems = sorted(plan.systems, key=plan.seconds, reverse=True)  # nothing long is left for the end
    yield from plan.draws
    for system in systems:
        yield from trials(plan, system, results)
    chosen = {system: choose(plan, system, results) for system in systems}
    for seed in range(plan.seeds):
        for system, setting in chosen.items():
            if setting is not None:
                yield plan.final(system, seed, setting)


def trials(plan: Plan, system: str, results: Results) -> list[Run]:
    """The settings of `system` that are tried: three learning rates, then whatever lies beyond the best so far.

    If the best learning rate is the largest or the smallest, that is another one beyond it, and then half the
    groups. Else it is half the groups, and then a quarter of them where half were better, or twice as many if not.
    The sixth and the seventh are the best of these with the system's own setting a factor of `OWN_STEP` higher, and
    lower.
    """
    centre = SYSTEMS[system].lr
    tried = [plan.trial(system, rate * centre, plan.groups) for rate in RATES[: plan.trials]]
    while len(tried) < min(plan.trials, WITHOUT_OWN) and all(run.name in results for run in tried):
        best = _best(tried, results)
        fewer = replace(best, groups=max(1, best.groups // 2))
        if len(tried) == len(RATES) and best.lr != centre:
            tried.append(replace(best, lr=best.lr * best.lr / centre))
        elif fewer not in tried:
            tried.append(fewer)
        else:
            tried.append(replace(best, groups=2 * best.groups))
    if plan.trials > WITHOUT_OWN and all(run.name in results for run in tried):
        best = _best(tried, results)
        tried += [replace(best, factor=factor) for factor in (OWN_STEP, 1 / OWN_STEP)][: plan.trials - WITHOUT_OWN]
    return tried


def choose(plan: Plan, system: str, results: Results) -> Run | None:
    """The best of the tried settings of `system`; None while some are still to be tried."""
    tried = trials(plan, system, results)
    if len(tried) < plan.trials or any(run.name not in results for run in tried):
        return None
    return _best(tried, results)


def _best(tried: list[Run], results: Results) -> Run:
    return max(tried, key=lambda run: final_reward(results[run.name]))


def final_reward(result: Mapping[str, Any]) -> float:
    """Held-out reward at the end of a run; −∞ where it failed."""
    if result.get("failure") or not result["points"]:
        return float("-inf")
    return result["points"][-1]["reward_mean"]


def next_run(plan: Plan, results: Results, running: Collection[str]) -> Run | None:
    """What to start now; None where everything left waits for runs that are under way, or nothing is left."""
    for run in wanted(plan, results):
        if run.name in results or run.name in running:
            continue
        needs = draw_run(run.seed, plan.groups)
        if run.kind != "draw" and SYSTEMS[run.system].offline and needs.name not in results:
            continue
        return run
    return None


def describe(plan: Plan, processes: int) -> list[str]:
    """The plan in words."""
    searches, finals = len(plan.systems) * plan.trials, len(plan.systems) * plan.seeds
    return [
        f"{len(plan.systems)} systems, {processes} runs at a time",
        f"tuning: {searches} runs of {SEARCH_SHARE * plan.final_s:.0f} s of training, {plan.trials} settings for each "
        "system",
        f"then {finals} runs of {plan.final_s:.0f} s of training, {plan.seeds} seeds for each system",
        *(
            f"{SYSTEMS[name].label} trains {plan.patience(name):g} times as long, in both"
            for name in plan.systems
            if plan.patience(name) != 1
        ),
        f"together {plan.training_s / 3600:.1f} hours of training, of one run at a time",
        f"each final run is evaluated {len(plan.marks)} times; evaluations do not count as training",
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON keeps it."""
    return json.loads(json.dumps(asdict(plan)))


def from_json(value: dict[str, Any]) -> Plan:
    """What `to_json` made."""
    return Plan(**{**value, "systems": tuple(value["systems"]), "marks": tuple(value["marks"])})
