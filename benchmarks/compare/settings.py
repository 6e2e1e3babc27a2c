"""Settings of the command."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config import STRICT, Count, Positive


@dataclass(kw_only=True, config=STRICT)
class CompareSettings:
    """A comparison."""

    quick: bool = False
    """Tiny runs of seconds: it shows that everything works, and nothing else."""
    long: bool = False
    """More images and seeds and six hours, one run at a time: for a GPU."""
    systems: tuple[str, ...] = ()
    """What is compared. Default: everything."""
    minutes: Positive | None = None
    """Time for all of it. Default: 110; long: 360; quick: what it takes."""
    seeds: Count | None = None
    """Final runs of each system. Default: 3; quick: 2; long: 5. A finished comparison goes on with more of them."""
    trials: Annotated[int, Field(ge=1, le=5)] | None = None
    """Settings tried for each system. Default: 5; quick: 1. A finished comparison goes on with more of them too; final
    runs are made again where another setting turns out best."""
    processes: Count | None = None
    """Runs at a time, each with its share of the cores. Default: 2 on a CPU, 1 on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    runs_dir: str = "runs/compare"
    """Where the runs are, and go on."""
    output: str | None = None
    """Where figures, tables and compare.json go. Default: benchmarks/results/<cpu or gpu>/compare; quick: beside the
    runs."""
    document: str = "docs/comparison.md"
    """A Markdown file whose marked parts become the tables and findings, where there is one; not after --quick."""
