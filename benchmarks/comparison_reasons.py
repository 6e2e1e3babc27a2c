"""Why some of the paper's claims stay open in the comparison: runs beside it, each of which changes one thing.

    python benchmarks/comparison_reasons.py [--seeds 0 1] [--only "three times" untrained …]
    python benchmarks/comparison_reasons.py --table

The timestep clip: in `benchmarks.compare` the rollouts' grid (DPM-Solver++, 8 steps, shift 3) ends at σ = 0.30, and
leaving the clip out adds this one noise level. The Euler solver's grid of 8 steps ends at σ = 0.009: with and without
the clip on that grid; and on the comparison's own grid, trained three times as long.

Groups and pairs: with 8 and with 32 images a group, of which Diffusion-DPO learns from two, and as many images an
iteration.

ODE and SDE rollouts: the search chose a quarter of the groups for the SDE, and all of them for the ODE: both with all,
half and a quarter, as far as the comparison does not have them. What the noise costs a rollout depends on its steps:
pictures of both before any training, with 10 steps and fewer (`untrained`), and both trained, and evaluated, with 4.

Everything else is as in the comparison. Processes have one thread, two run at a time. Writes
`benchmarks/results/cpu/comparison_reasons.json`, where rows that are not made again stay; `--table` prints it as
Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this folder has a `kernels.py`, which would stand before a library

import numpy as np

from benchmarks.compare.curves import mean_interval
from benchmarks.compare.quality import PatchBank, diversity
from benchmarks.compare.run import QUALITY_IMAGES, Run, perform
from benchmarks.compare.systems import NORMAL, SYSTEMS, Scale, System, configuration
from benchmarks.first_light import RESULTS, machine
from dgpo_fast.build import build
from dgpo_fast.config import recipes
from dgpo_fast.config.options import Config
from dgpo_fast.models.loading import read_model
from dgpo_fast.rollout.schedule import make_schedule
from dgpo_fast.trainer import Trainer

PATH = RESULTS / "cpu/comparison_reasons.json"
LR, DPO_LR, MARKS = 2e-4, 8e-5, (0.5, 1.0)


def on_eulers_grid(config: Config) -> Config:
    """With rollouts and training noise on the Euler solver's grid."""
    return replace(config, rollout=replace(config.rollout, solver="euler"))


@dataclass(frozen=True)
class Arm:
    """What is trained: settings, groups an iteration, seconds of training, images a group, solver steps and learning
    rate."""

    recipe: Callable[[], Config]
    groups: int
    seconds: float
    group_size: int = NORMAL.group_size
    steps: int = NORMAL.steps
    lr: float = LR

    @property
    def scale(self) -> Scale:
        """As `benchmarks.compare` has it."""
        return replace(NORMAL, group_size=self.group_size, steps=self.steps)


ARMS = {
    "Euler's grid, with the clip": Arm(lambda: on_eulers_grid(recipes.tiny_shapes()), NORMAL.groups, 150),
    "Euler's grid, no clip": Arm(lambda: on_eulers_grid(recipes.tiny_shapes_no_timestep_clip()), NORMAL.groups, 150),
    "ODE rollouts, half the groups": Arm(recipes.tiny_shapes, NORMAL.groups // 2, 224),
    "ODE rollouts, a quarter of the groups": Arm(recipes.tiny_shapes, NORMAL.groups // 4, 224),
    "SDE rollouts, all groups": Arm(recipes.tiny_shapes_sde, NORMAL.groups, 224),
    "SDE rollouts, half the groups": Arm(recipes.tiny_shapes_sde, NORMAL.groups // 2, 224),
    "three times the time, with the clip": Arm(recipes.tiny_shapes, NORMAL.groups, 672),
    "three times the time, no clip": Arm(recipes.tiny_shapes_no_timestep_clip, NORMAL.groups, 672),
    "groups of 8": Arm(recipes.tiny_shapes, 32, 150, 8),
    "groups of 8, Diffusion-DPO": Arm(recipes.tiny_shapes_diffusion_dpo, 32, 150, 8, lr=DPO_LR),
    "groups of 32": Arm(recipes.tiny_shapes, 8, 150, 32),
    "groups of 32, Diffusion-DPO": Arm(recipes.tiny_shapes_diffusion_dpo, 8, 150, 32, lr=DPO_LR),
    "4 steps, ODE rollouts": Arm(recipes.tiny_shapes, NORMAL.groups, 150, steps=4),
    "4 steps, SDE rollouts": Arm(recipes.tiny_shapes_sde, NORMAL.groups, 150, steps=4),
}


def run_of(arm: str, seed: int) -> Run:
    """As the comparison names it."""
    return Run("final", arm, seed, ARMS[arm].lr, ARMS[arm].groups, ARMS[arm].seconds, MARKS)


def train(arm: str, seed: int, home: Path) -> None:
    """One run in this process; its result lies in its folder under `home`."""
    SYSTEMS[arm] = System(arm, arm, ARMS[arm].recipe, ARMS[arm].lr)
    perform(run_of(arm, seed), home, ARMS[arm].scale, "cpu", lambda share: None, lambda: False)


def measure(arms: list[str], seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """arm → what came out for each seed."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:

        def result(arm: str, seed: int) -> dict[str, Any]:
            command = [sys.executable, __file__, "--arm", arm, "--seeds", str(seed)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "--home", scratch], check=True, env=environment)
            return json.loads((Path(scratch) / run_of(arm, seed).name / "result.json").read_text())

        found = {arm: [pool.submit(result, arm, seed) for seed in seeds] for arm in arms}
        return {arm: [future.result() for future in futures] for arm, futures in found.items()}


def rollouts(draws: int = 3) -> list[dict[str, Any]]:
    """What ODE and SDE rollouts of the shipped weights are like, of the same prompts: 256 images a draw."""
    bank, made = PatchBank(), []
    for steps, name in product((10, 8, 6, 4, 3), ("dgpo", "dgpo-sde")):
        scale = replace(NORMAL, images=16, steps=steps)
        config = configuration(
            SYSTEMS[name], scale, lr=LR, groups=NORMAL.groups, seed=0, evaluation_seed=0, device="cpu"
        )
        trainer = Trainer(build(config))
        with tempfile.TemporaryDirectory() as folder:
            trainer.prepare(Path(folder), lambda: False)
            groups = [trainer.source.collect(draw)[0] for draw in range(draws)]
        pictures = np.concatenate([trainer.sampler.decode(of.x0).images for of in groups])
        trainer.close()
        rewards = np.concatenate([of.scores.rewards for of in groups]).reshape(-1, NORMAL.group_size)
        made.append(
            {
                "rollouts": SYSTEMS[name].label,
                "steps": steps,
                "images": len(pictures),
                "reward_mean": float(rewards.mean()),
                "reward_std_in_groups": float(rewards.std(axis=1).mean()),
                "patch_distance": bank.distance(pictures[:: len(pictures) // QUALITY_IMAGES]),
                "diversity": diversity(pictures, NORMAL.group_size),
            }
        )
    return made


def rollout_rows(made: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| steps | rollouts | reward | its deviation within groups | patch distance | diversity |"
    yield "|---|---|---|---|---|---|"
    for row in made:
        noise = "SDE" if "SDE" in row["rollouts"] else "ODE"
        yield (
            f"| {row['steps']} | {noise} | {row['reward_mean']:.3f} | {row['reward_std_in_groups']:.3f} | "
            f"{row['patch_distance']:.2f} | {row['diversity']:.1f} |"
        )


def rows(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| DGPO with | time | images | reward | patch distance | signs read |"
    yield "|---|---|---|---|---|---|"
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
        images = mean_interval([point["trained_images"] for point in last])[0]
        yield f"| {arm} | {results[0]['run']['seconds']:.0f} s | {images:,.0f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of what is trained")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        train(options.arm, options.seeds[0], options.home)
        return
    if not options.table:
        content = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {"runs": {}, "rollouts": []}
        if any(part in "untrained" for part in options.only):
            content["rollouts"] = rollouts()
        made = content["runs"] | measure(
            [arm for arm in ARMS if any(part in arm for part in options.only)], options.seeds
        )
        found = {arm: made[arm] for arm in ARMS if arm in made}
        sigmas = {
            solver: make_schedule(solver, NORMAL.steps, read_model(recipes.tiny_shapes()).architecture.shift)
            .sigmas[:-1]
            .tolist()
            for solver in ("dpmpp_2m", "euler")
        }
        content |= {"machine": machine(), "sigmas": sigmas, "runs": found}
        PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    content = json.loads(PATH.read_text(encoding="utf-8"))
    print("\n".join([*rows(content["runs"]), "", *rollout_rows(content["rollouts"])]))


if __name__ == "__main__":
    main()
