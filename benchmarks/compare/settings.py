"""Settings of `python -m benchmarks.compare`."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, Positive


@dataclass(kw_only=True, config=STRICT)
class CompareSettings:
    """A comparison of training methods."""

    quick: bool = False
    """Train each system for a few seconds, only to check that everything works."""
    long: bool = False
    """A longer comparison for a GPU: six hours, more images and seeds, one run at a time."""
    study: str = "rivals"
    """The question. rivals: which objective learns most from equal compute. paper: the paper's own comparisons.
    four-steps and five-steps: ODE against SDE rollouts of 4 and 5 steps. clip: the timestep clip, with training levels
    off the grid, on pictures of 4 steps. part-of-group: training on part of each group."""
    systems: tuple[str, ...] = ()
    """Systems to compare. Default: all of the study."""
    minutes: Positive | None = None
    """Time for the whole comparison, in minutes. Default: the study's, as 150 for rivals; with --long 360; with --quick
    no limit."""
    seeds: Count | None = None
    """Number of final runs per system, each with its own seed. Default: 3; with --quick 2; with --long 5. If you
    raise it after a comparison has finished, only the additional runs are trained."""
    trials: Annotated[int, Field(ge=1, le=7)] | None = None
    """Number of settings tried per system. Default: the study's, 7 for rivals and else 5; with --quick 1. If you
    raise it after a comparison has finished, the additional settings are tried. If one of them is the best, that
    system's final runs are trained again."""
    processes: Count | None = None
    """Number of runs at a time. They share the CPU cores evenly. Default: 2 on a CPU, 1 on a GPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one, else the CPU."""
    runs_dir: str = "runs/compare"
    """Folder of the runs, one inside for each study. A comparison that was stopped continues from what is in it."""
    output: str | None = None
    """Folder for figures, tables and compare.json. Default: the study's in benchmarks/results/cpu/compare or
    benchmarks/results/gpu/compare; with --quick in the folder of the runs."""
    document: str = "docs/comparison.md"
    """Markdown file whose marked parts are replaced by the new tables and findings, if it exists. Unused with
    --quick."""
