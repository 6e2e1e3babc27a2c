"""What waiting OpenMP threads cost on a CPU that other programs use too.

    python -m benchmarks.shared_cpu [--repeats 20] [--only GOMP_SPINCOUNT=1000 …]

Times a forward, and a forward and backward, of the shipped transformer with 128 images, and an iteration of
`tiny-shapes`, alone and beside one and two processes that never rest, for several settings of the OpenMP library
(libgomp). Each is a fresh process, since the library reads its settings when it is loaded. Takes about a quarter of an
hour on two cores, which must be idle otherwise. Writes `shared_cpu.json` and the table in docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # before dgpo_fast, which would set what is measured here

from benchmarks.pages import PERFORMANCE, replace_part
from benchmarks.systems import Ours
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.models.loading import make_pipeline
from dgpo_fast.profiling.machine import commit, cpu_name

RESULT = Path(__file__).parent / "results/cpu/shared_cpu.json"
UNSET = "nothing"
SETTINGS = (UNSET, "OMP_WAIT_POLICY=passive", "GOMP_SPINCOUNT=1000", "GOMP_SPINCOUNT=3000", "GOMP_SPINCOUNT=10000")
BUSY = (0, 1, 2)
WORK = {"forward": "forward, ms", "training": "forward and backward, ms", "iteration": "iteration of `tiny-shapes`, ms"}
IMAGES = 128


def timed(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat, by kind of work; by the clock, as a user feels it."""
    config = get_recipe("tiny-shapes")
    device = torch.device("cpu")
    transformer = make_pipeline(config, device=device, dtype=torch.float32, with_text=False).transformer
    transformer.requires_grad_(True)
    shape, side = transformer.config, transformer.config.sample_size
    inputs = {
        "hidden_states": torch.randn(IMAGES, shape.in_channels, side, side),
        "encoder_hidden_states": torch.randn(IMAGES, 77, shape.joint_attention_dim),
        "pooled_projections": torch.randn(IMAGES, shape.pooled_projection_dim),
        "timestep": torch.full((IMAGES,), 500.0),
    }

    def train() -> None:
        transformer.zero_grad()
        transformer(**inputs, return_dict=False)[0].square().mean().backward()

    ways = {"forward": torch.no_grad()(lambda: transformer(**inputs)), "training": train}
    found = {name: [_milliseconds(way) for _ in range(repeats + 2)][2:] for name, way in ways.items()}
    step = Ours(config, device).step
    return found | {"iteration": [_milliseconds(step) for _ in range(max(1, repeats // 4) + 1)][1:]}


def _milliseconds(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return 1e3 * (time.perf_counter() - started)


def beside(busy: int, setting: str, repeats: int) -> dict[str, list[float]]:
    """`timed` in a fresh process with `setting`, beside `busy` processes that never rest."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    if setting != UNSET:
        name, value = setting.split("=")
        environment[name] = value
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [sys.executable, "-m", "benchmarks.shared_cpu", "--timed", "--repeats", str(repeats)]
        run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(run.stdout.splitlines()[-1])  # after what the trainer says of itself
    finally:
        for other in others:
            other.kill()
            other.wait()


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    head = ["set before torch is imported", "measured", *("idle" if n == 0 else f"beside {n} busy" for n in BUSY)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in report["rows"]):
        rows = {row["busy"]: row for row in report["rows"] if row["setting"] == setting}
        shown = setting if setting == UNSET else f"`{setting}`"
        for name, title in WORK.items():
            cells = [_cell(rows.get(busy, {}).get(name, [])) for busy in BUSY]
            lines.append(f"| {' | '.join([shown, title, *cells])} |")
    about = f"{report['machine']}, torch {report['torch']}, commit {report['commit']}, {report['date']}."
    return "\n".join([*lines, "", f"{IMAGES} images; medians, with 10 and 90 % quantiles. {about}"])


def _cell(milliseconds: list[float]) -> str:
    if not milliseconds:
        return "not measured"
    low, middle, high = np.quantile(milliseconds, (0.1, 0.5, 0.9))
    return f"{middle:.0f} ({low:.0f}, {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="of a forward; of iterations a quarter")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING")
    parser.add_argument("--out", type=Path, default=RESULT, help="with another file than the default, docs stay")
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timed:
        print(json.dumps(timed(options.repeats)))
        return
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": cpu_name()}
    report |= {"torch": torch.__version__, "rows": []}
    for setting in options.only:
        for busy in BUSY:
            found = beside(busy, setting, options.repeats)
            report["rows"].append({"setting": setting, "busy": busy, **found})
            print(setting, busy, {name: _cell(values) for name, values in found.items()}, flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out == RESULT:
        replace_part("shared_cpu", table(report), PERFORMANCE)


if __name__ == "__main__":
    main()
