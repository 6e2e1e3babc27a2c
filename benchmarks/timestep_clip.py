"""What the timestep clip protects: DGPO with it and without it, on a grid that goes down to hardly any noise.

    python benchmarks/timestep_clip.py [--seeds 0 1] [--seconds 150]
    python benchmarks/timestep_clip.py --table

In `dgpo_fast.compare` the rollouts' grid (DPM-Solver++, 8 steps, shift 3) ends at σ = 0.30, and leaving the clip out
adds this one noise level. The Euler solver's grid of 8 steps ends at σ = 0.009. Everything else is as in the
comparison, evaluations with DPM-Solver++ included; the runs are processes of one thread, two at a time.

Writes `benchmarks/results/cpu/timestep_clip.json`; `--table` prints it as Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from first_light import RESULTS, machine

from dgpo_fast import recipes
from dgpo_fast.compare.curves import mean_interval
from dgpo_fast.compare.run import Run, perform
from dgpo_fast.compare.systems import NORMAL, SYSTEMS, System
from dgpo_fast.config import Config
from dgpo_fast.schedule import make_schedule

PATH = RESULTS / "cpu/timestep_clip.json"
LR, MARKS = 2e-4, (0.5, 1.0)
ARMS = {"with the clip": recipes.tiny_shapes, "without": recipes.tiny_shapes_no_timestep_clip}


def on_eulers_grid(arm: str) -> Config:
    """The recipe of an arm, with rollouts and training noise on the Euler solver's grid."""
    config = ARMS[arm]()
    return replace(config, rollout=replace(config.rollout, solver="euler"))


def train(arm: str, seed: int, seconds: float, home: Path) -> None:
    """One run in this process; its result lies in its folder under `home`."""
    SYSTEMS[arm] = System(arm, arm, lambda: on_eulers_grid(arm), LR)
    perform(run_of(arm, seed, seconds), home, NORMAL, "cpu", lambda share: None, lambda: False)


def run_of(arm: str, seed: int, seconds: float) -> Run:
    """As the comparison names it."""
    return Run("final", arm, seed, LR, NORMAL.groups, seconds, MARKS)


def measure(seeds: list[int], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """arm → what came out for each seed."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:

        def result(arm: str, seed: int) -> dict[str, Any]:
            command = [sys.executable, __file__, "--arm", arm, "--seeds", str(seed), "--seconds", str(seconds)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "--home", scratch], check=True, env=environment)
            return json.loads((Path(scratch) / run_of(arm, seed, seconds).name / "result.json").read_text())

        found = {arm: [pool.submit(result, arm, seed) for seed in seeds] for arm in ARMS}
        return {arm: [future.result() for future in futures] for arm, futures in found.items()}


def rows(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| Euler's grid | reward | patch distance | signs read |"
    yield "|---|---|---|---|"
    for arm, results in found.items():
        last = [result["points"][-1] for result in results]
        values = [
            ([point["reward_mean"] for point in last], 3),
            ([point["patch_distance"] for point in last], 2),
            ([result["out_of_task"]["signs"] for result in results], 3),
        ]
        cells = []
        for of, digits in values:
            each = ", ".join(f"{value:.{digits}f}" for value in of)
            cells.append(f"{mean_interval(of)[0]:.{digits}f} ({each})")
        yield f"| {arm} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=150.0, help="of training, for each run")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        train(options.arm, options.seeds[0], options.seconds, options.home)
        return
    if not options.table:
        found = measure(options.seeds, options.seconds)
        sigmas = make_schedule("euler", NORMAL.steps, recipes.tiny_shapes().rollout.shift).sigmas[:-1]
        content = {"machine": machine(), "seconds": options.seconds, "sigmas": sigmas.tolist(), "runs": found}
        PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(rows(json.loads(PATH.read_text(encoding="utf-8"))["runs"])))


if __name__ == "__main__":
    main()
