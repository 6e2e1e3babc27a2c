"""`python -m dgpo_fast.profile`: where an iteration's time goes, on one page."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dgpo_fast.config.command_line import configure, launched_with_others, take_count, take_option
from dgpo_fast.config.help import print_help
from dgpo_fast.config.options import Config, Log
from dgpo_fast.config.reading import resolve, to_dict
from dgpo_fast.errors import UserError

if TYPE_CHECKING:
    from dgpo_fast.distributed import Processes
    from dgpo_fast.profiling.report import Report

USAGE = """Profile a few iterations of a training run and write report.html, report.json and a Chrome trace.

  python -m dgpo_fast.profile                                      coloured shapes, with the shipped small pipeline
  python -m dgpo_fast.profile sd35m-geneval --random-weights       a model of SD3.5-Medium's size, without a download
  python -m dgpo_fast.profile my.yaml --measured 10 --warmup 3     your own settings, over more iterations
  torchrun --standalone --nproc-per-node 8 -m dgpo_fast.profile sd35m-geneval     eight processes; only process 0 traces
  python -m dgpo_fast.profile --compare A B                        compare two profiles, with ratios

--warmup N iterations (1) are run but not measured. --measured N iterations (3) are timed. One more is traced."""


def profile(args: list[str]) -> int:
    """Runs the command line's profile; returns the exit status."""
    given, args = list(args), list(args)
    if {"-h", "--help"} & set(args):
        print_help(USAGE, args)
        return 0
    if "--compare" in args:
        return compare(args)
    # Alone, a wrong command line is refused before the imports below, which take seconds.
    plan = None if launched_with_others() else read_plan(args)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the tracer talks to the terminal otherwise
    from dgpo_fast.distributed import connect
    from dgpo_fast.lifecycle import set_up
    from dgpo_fast.profiling.session import Session

    processes = connect()
    with processes.together("the settings"):
        if processes.first and plan is None:
            plan = read_plan(args)
    plan = shared_plan(plan, processes)
    with set_up(plan.config, processes) as trainer, made_by_the_first(plan.folder, processes):
        report = Session(trainer, plan.folder).run(plan.warmup, plan.measured, given)
    with processes.together("the report of process 0"):
        if report is not None:
            write(report, plan.folder, trainer.console.note)
    processes.close()
    return 0


@contextmanager
def made_by_the_first(folder: Path, processes: "Processes") -> Iterator[None]:
    """Makes `folder`, and removes it if the block fails: half a profile is none."""
    with processes.together("the profile's folder"):
        if processes.first:
            folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if processes.first:
            shutil.rmtree(folder)
        raise


def write(report: "Report", folder: Path, note: Callable[[str], None]) -> None:
    """Writes the report into `folder`, and says in a few sentences what is in it."""
    from dgpo_fast.profiling.page import write_page
    from dgpo_fast.profiling.report import write_report
    from dgpo_fast.profiling.summary import sentences

    write_report(report, folder)
    write_page(report, folder)
    for sentence in sentences(report):
        note(sentence)
    note(f"open {folder / 'report.html'} in a browser; the trace opens in ui.perfetto.dev")


@dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    config: Config
    folder: Path
    warmup: int
    measured: int


def read_plan(args: list[str]) -> Plan:
    """What `args` ask for."""
    args = list(args)
    warmup, measured = take_count(args, "warmup", 1), take_count(args, "measured", 3)
    config = configure(args)
    evaluation = replace(config.evaluation, every=0)
    config = replace(config, iterations=warmup + measured + 1, evaluation=evaluation, log=Log())
    return Plan(config, new_folder(config), warmup, measured)


def shared_plan(plan: Plan | None, processes: "Processes") -> Plan:
    """Process 0's plan, on every process."""
    mine = None if plan is None else [to_dict(plan.config), str(plan.folder), plan.warmup, plan.measured]
    settings, folder, warmup, measured = processes.broadcast(mine, "the settings")
    return Plan(resolve(Config(), settings, "process 0"), Path(folder), warmup, measured)


def new_folder(config: Config) -> Path:
    """The folder of a new profile, not yet made. Raises UserError if it exists."""
    folder = Path(config.runs_dir) / (config.name or f"profile-{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name")
    return folder


def compare(args: list[str]) -> int:
    """Shows two profiles side by side and writes the page of it; returns the exit status."""
    output = Path(take_option(args, "output") or "comparison.html")
    args.remove("--compare")
    if len(args) != 2 or any(arg.startswith("-") for arg in args):
        raise UserError("command line: --compare takes two profiles: their folders, or their report.json files")

    from dgpo_fast.profiling.compare import comparison_page, console_table
    from dgpo_fast.profiling.report import read_report
    from dgpo_fast.run.console import Console

    first, second = (read_report(Path(arg)) for arg in args)
    names = (args[0], args[1])
    console = Console()
    console.rich.print(console_table(first, second, names))
    output.write_text(comparison_page(first, second, names), encoding="utf-8")
    console.note(f"the same as a page: {output}")
    return 0
