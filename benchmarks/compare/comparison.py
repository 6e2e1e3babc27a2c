"""The whole comparison: base, tuning, final runs, report; from wherever an earlier start was stopped."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare import plan as planning
from benchmarks.compare.plan import (
    SEARCH_SEED,
    Plan,
    base_run,
    describe,
    draw_run,
    final_reward,
    finished_seeds,
    fitted,
    next_run,
)
from benchmarks.compare.report import update_document, write_report
from benchmarks.compare.run import MARKS, Run, finished_result
from benchmarks.compare.settings import CompareSettings
from benchmarks.compare.studies import STUDIES
from benchmarks.compare.systems import LONG, NORMAL, QUICK, SYSTEMS
from benchmarks.compare.workers import Workers
from benchmarks.first_light import machine
from dgpo_fast.errors import UserError
from dgpo_fast.models.loading import pick_device
from dgpo_fast.run.console import Console, duration
from dgpo_fast.run.folder import FolderLock
from dgpo_fast.run.metrics import write_json

PLAN, SPENT = "plan.json", "spent.json"
LINE_EVERY_S = 30.0
QUICK_S, QUICK_MARKS = 1.0, (0.5, 1.0)


class Comparison:
    """One comparison in its folder.

    Args:
        settings: of the command.

    Raises UserError if the study, a system or the device is unknown.
    """

    def __init__(self, settings: CompareSettings):
        if settings.study not in STUDIES:
            raise UserError(f"--study {settings.study}: name one of {', '.join(STUDIES)}")
        self.study = study = STUDIES[settings.study]
        unknown = [name for name in settings.systems if name not in study.systems]
        if unknown:
            raise UserError(f"--systems {unknown[0]}: name some of {', '.join(study.systems)}")
        kind = "quick" if settings.quick else "long" if settings.long else "normal"
        self.settings, self.kind = settings, kind
        self.scale = study.scaled({"quick": QUICK, "normal": NORMAL, "long": LONG}[kind])
        self.device = pick_device(settings.device)
        self.systems = tuple(name for name in study.systems if not settings.systems or name in settings.systems)
        self.seeds = settings.seeds or {"quick": 2, "normal": 3, "long": 5}[kind]
        self.trials = settings.trials or (1 if settings.quick else study.trials)
        self.minutes = settings.minutes or {"quick": None, "normal": study.minutes, "long": 360.0}[kind]
        self.processes = settings.processes or (2 if self.device.type == "cpu" else 1)
        self.home = Path(settings.runs_dir) / study.name
        self.console = Console()
        self.results: dict[str, dict[str, Any]] = {}
        self.shown_s = 0.0

    @property
    def output(self) -> Path:
        """Where figures and tables go."""
        if self.settings.output:
            return Path(self.settings.output)
        if self.settings.quick:
            return self.home / "results"
        kind = "gpu" if self.device.type == "cuda" else "cpu"
        return Path("benchmarks/results") / kind / "compare" / self.study.name

    def run(self) -> None:
        """Does what is left to do, and reports."""
        self.home.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.home)
        workers = Workers(self.home, self.scale, str(self.device), self.processes)
        self.started_s = time.monotonic()
        self.spent_before_s = self._spent_before()
        self._keep_spent()  # before there is a plan: a start that is killed at any time has written its seconds down
        try:
            self._measure_base(workers)
            plan = self._plan()
            for line in describe(plan, self.processes):
                self.console.note(line)
            self._do(workers, plan)
            workers.close()
        except BaseException:
            workers.stop()
            self.console.note("stopped; the same command continues from here")
            raise
        finally:
            self._keep_spent()
            lock.release()
        self._report(plan)

    def _measure_base(self, workers: Workers) -> None:
        """The model as it came, and the first data for the offline systems: their seconds make the plan."""
        first = [base_run(self.scale.groups)]
        if any(SYSTEMS[name].offline for name in self.systems):
            first.append(draw_run(SEARCH_SEED, self.scale.groups))
        for run in first:
            self._recall(run)
        left = [run for run in first if run.name not in self.results]
        if left:
            self.console.note(f"the model as it came: {self.scale.images} images of held-out prompts …")
        workers.run_all(
            lambda running: next((r for r in left if r.name not in self.results and r.name not in running), None),
            lambda run, result: self.results.update({run.name: result}),
            lambda shares: None,
        )

    def _spent_before(self) -> float | None:
        """Seconds on the wall of earlier starts; None if there is a plan without them, as of earlier versions."""
        try:
            return float(json.loads((self.home / SPENT).read_text(encoding="utf-8"))["wall_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return None if (self.home / PLAN).exists() else 0.0

    def _keep_spent(self) -> None:
        if (spent := self._spent()) is not None:
            write_json(self.home / SPENT, {"wall_s": spent})

    def _spent(self) -> float | None:
        """Seconds on the wall of all starts, if they are known."""
        return None if self.spent_before_s is None else self.spent_before_s + time.monotonic() - self.started_s

    def _plan(self) -> Plan:
        """The plan of an earlier start, with more seeds and trials if there are to be more, or a new one.

        Raises UserError if the earlier one had other settings.
        """
        wanted = {
            "study": self.study.name,
            "kind": self.kind,
            "systems": list(self.systems),
            "seeds": self.seeds,
            "trials": self.trials,
            "minutes": self.minutes,
            "processes": self.processes,
            "device": str(self.device),
        }
        path = self.home / PLAN
        if path.is_file():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                differs = [name for name in wanted if kept["settings"][name] != wanted[name]]
                plan = planning.from_json(kept["plan"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: damaged; remove {self.home} or choose another --runs-dir") from None
            more = replace(plan, seeds=max(plan.seeds, self.seeds), trials=max(plan.trials, self.trials))
            if set(differs) <= {"seeds", "trials"} and (more.seeds, more.trials) == (self.seeds, self.trials):
                write_json(path, {"settings": wanted, "plan": planning.to_json(more)})
                return more
            if differs:
                raise UserError(
                    f"{self.home}: a comparison with another {differs[0]} was begun there; remove it, or "
                    "choose another --runs-dir"
                )
            return plan
        base = self.results[base_run(self.scale.groups).name]
        draw = self.results.get(draw_run(SEARCH_SEED, self.scale.groups).name, {"drawing_s": 0.0})
        marks = QUICK_MARKS if self.settings.quick else MARKS
        plan = Plan(self.study.name, self.systems, self.seeds, self.trials, QUICK_S, marks, self.scale.groups)
        if self.minutes is not None:
            plan = fitted(plan, 60 * self.minutes, self.processes, base, draw["drawing_s"])
        write_json(path, {"settings": wanted, "plan": planning.to_json(plan)})
        return plan

    def _do(self, workers: Workers, plan: Plan) -> None:
        reported = 0

        def done(run: Run, result: dict[str, Any]) -> None:
            nonlocal reported
            self.results[run.name] = result
            self._tell(plan, run, result)
            if reported < (seeds := finished_seeds(plan, self.results)) < plan.seeds:
                reported = seeds
                self._report(replace(plan, seeds=seeds))

        def pick(running: set[str]) -> Run | None:
            while (run := next_run(plan, self.results, running)) is not None:
                if not self._recall(run):
                    return run
            return None

        with self.console.track(f"{plan.size} runs") as on_share:
            workers.run_all(pick, done, lambda shares: self._show(plan, shares, on_share))

    def _recall(self, run: Run) -> bool:
        """Whether an earlier start has done `run`; then its result is taken."""
        result = finished_result(run, self.home)
        if result is not None:
            self.results[run.name] = result
        return result is not None

    def _tell(self, plan: Plan, run: Run, result: dict[str, Any]) -> None:
        if run.kind == "draw":
            text = f"drawn in {result['drawing_s']:.0f} s"
        elif result["failure"]:
            text = f"failed: {result['failure']}"
        else:
            text = f"reward {final_reward(result):.3f} after {result['points'][-1]['iteration']} iterations"
        elapsed = duration(time.monotonic() - self.started_s)
        self.console.note(f"[{self._done(plan)}/{plan.size}, {elapsed}] {run.name}: {text}")

    def _done(self, plan: Plan) -> int:
        return sum(name.startswith(("draw/", "search/", "final/")) for name in self.results)

    def _show(self, plan: Plan, shares: dict[str, float], on_share: Any) -> None:
        self._keep_spent()
        on_share((self._done(plan) + sum(shares.values())) / plan.size)
        now = time.monotonic()
        if not self.console.rich.is_terminal and now - self.shown_s > LINE_EVERY_S:
            self.shown_s = now
            running = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
            self.console.note(f"[{self._done(plan)}/{plan.size}, {duration(now - self.started_s)}] running: {running}")

    def _report(self, plan: Plan) -> None:
        about = {**machine(), "cpu_count": os.cpu_count(), "processes": self.processes, "wall_s": self._spent()}
        base = self.results[base_run(self.scale.groups).name]
        findings = write_report(plan, self.results, base, about | {"kind": self.device.type}, self.output)
        for finding in findings:
            self.console.note(f"{finding.claim}: {finding.verdict}. {finding.sentence}")
        document = Path(self.settings.document)
        if not self.settings.quick and update_document(document, self.output):
            self.console.note(f"{document} has the new tables and findings")
        self.console.note(f"figures, tables and compare.json are in {self.output}")
