"""Benchmarks of the kernels from start to results: ``python benchmarks/kernels.py [test] [tune] [bench] [report]``.

``test`` runs the kernels' tests on the machine at hand, ``tune`` times block sizes (GPU alone), ``bench`` times the
ops into ``kernels.json`` and ``report`` makes ``kernels.md`` and ``kernels.png`` of it; bench and report where
nothing is named. All files go to ``benchmarks/results/<cpu or gpu>/``.
"""

import datetime
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this file would stand before the library of its name

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from dgpo_fast.profiling.machine import commit

STEPS = {"test", "tune", "bench", "report"}
COLORS = {"eager, stored noise": "#999999", "eager": "#d08c2e", "compile": "#3a7ca5", "triton": "#2a8c5a"}


def results_folder() -> Path:
    """The results' folder of this machine's device."""
    folder = ROOT / "benchmarks" / "results" / ("gpu" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_pytest(*arguments: str) -> int:
    """Its exit status: a case that fails leaves the others' results."""
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


def tune(folder: Path) -> None:
    """Times block sizes of the three kernels over tiles at B = 96 and stores all that are measured, fastest first."""
    from dgpo_kernels.triton import noise
    from dgpo_kernels.triton.launch import TileConfig
    from dgpo_kernels.triton.loss_partials import loss_partials
    from dgpo_kernels.triton.policy_gradient import policy_gradient

    from benchmarks.test_kernel_speed import DTYPE, GROUP_SIZE, LATENT, gpu_times_us

    policy, ref, old, x0 = torch.randn(4, 96, *LATENT, device="cuda").to(DTYPE).unbind()
    out = torch.empty_like(x0)
    sigma, weights = torch.rand(2, 96, device="cuda").unbind()
    one = torch.ones((), device="cuda")
    given = (
        torch.arange(96, device="cuda") // GROUP_SIZE,
        torch.tensor(1, device="cuda"),
        torch.tensor(2, device="cuda"),
    )
    kernels = {
        "group noise": lambda config: noise._launch(x0, sigma, *given, out, 0, config),
        "loss forward": lambda config: loss_partials(policy, ref, x0, old, ref, True, *given, config),
        "loss backward": lambda config: policy_gradient(one, policy, x0, ref, *given, weights, one, 0.1, config),
    }
    tried = []
    for name, kernel in kernels.items():
        for block, span, registers in itertools.product((512, 1024, 2048), (2, 4, 6, 8), (168, 255)):
            config = TileConfig(block, warps_per_sm=8, span=span, max_registers=registers)
            times = sorted(gpu_times_us(lambda kernel=kernel, config=config: kernel(config)))
            tried.append({"kernel": name, "block": block, "span": span, "max_registers": registers, "us": times[25]})
        tried.sort(key=lambda row: (row["kernel"], row["us"]))
        (folder / "tuning.json").write_text(json.dumps(tried, indent=1) + "\n")


def bench(folder: Path) -> int:
    """Runs the benchmarks and keeps what the report needs of pytest-benchmark's file; their exit status."""
    raw = folder / "raw.json"
    status = run_pytest("benchmarks/test_kernel_speed.py", "--benchmark-only", f"--benchmark-json={raw}", "-q")
    measured = json.loads(raw.read_text())
    rows = []
    for case in measured["benchmarks"]:
        quantiles = {"call_us_50": case["stats"]["median"] * 1e6, "call_us_25": case["stats"]["q1"] * 1e6}
        rows.append(case["extra_info"] | quantiles | {"call_us_75": case["stats"]["q3"] * 1e6})
    about = {"date": datetime.date.today().isoformat(), "commit": commit()}
    (folder / "kernels.json").write_text(json.dumps(about | {"cases": rows}, indent=1) + "\n")
    raw.unlink()
    return status


def time_us(row: dict[str, Any]) -> float:
    """GPU time if it was measured, else that of the call."""
    return row.get("gpu_us_50", row["call_us_50"])


def gb_per_s(row: dict[str, Any]) -> float:
    return row["bytes"] / time_us(row) / 1000


def table(cases: list[dict[str, Any]]) -> str:
    """A Markdown table with a row for each op and size, and a column for each implementation."""
    implementations = list(COLORS)
    head = ["op", "B", "elements", *[f"{name}, µs" for name in implementations], "best GB/s", "of copy", "extra MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (op, batch, elements), group in itertools.groupby(cases, lambda r: (r["op"], r["batch"], r["elements"])):
        rows = {row["impl"]: row for row in group}
        best = min(rows.values(), key=time_us)
        cells = [op, str(batch), f"{elements:,}"]
        for name in implementations:
            missing = "as eager" if name.startswith("eager,") and op.startswith("guided") else "not measured"
            mark = "**" if name == best["impl"] else ""
            cells.append(f"{mark}{time_us(rows[name]):.1f}{mark}" if name in rows else missing)
        share = gb_per_s(best) / best["copy_gb_per_s"]
        memory = f"{best['peak_mib']:.1f}" if "peak_mib" in best else "not measured"
        lines.append("| " + " | ".join([*cells, f"{gb_per_s(best):.2f}", f"{share:.0%}", memory]) + " |")
    return "\n".join(lines)


def plot(cases: list[dict[str, Any]], file: Path) -> None:
    """Bandwidth against size for each op, and a roofline of all."""
    ops = list(dict.fromkeys(row["op"] for row in cases))
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    copy = cases[0]["copy_gb_per_s"]
    for axis, op in zip(axes.flat, ops, strict=False):
        for name, color in COLORS.items():
            rows = sorted((r for r in cases if r["op"] == op and r["impl"] == name), key=lambda r: r["elements"])
            if rows:
                axis.plot([r["elements"] for r in rows], list(map(gb_per_s, rows)), "o-", color=color, label=name)
        axis.axhline(copy, color="black", linestyle="--", linewidth=1, label="copy")
        axis.set(title=op, xlabel="latent elements", ylabel="GB/s", xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    roof = axes.flat[5]
    largest = max(row["elements"] for row in cases)
    for row in (r for r in cases if r["elements"] == largest):
        intensity = row["flops"] / row["bytes"]
        roof.plot(intensity, row["flops"] / time_us(row) / 1000, "o", color=COLORS[row["impl"]])
    line = [0.3, 3.0]
    roof.plot(line, [copy * intensity for intensity in line], "k--", linewidth=1)
    roof.set(title="roofline at the largest size", xlabel="FLOP/byte (noise not counted)", ylabel="GFLOP/s")
    roof.set(xscale="log", yscale="log")
    roof.set_xticks([0.3, 0.5, 1, 2, 3], ["0.3", "0.5", "1", "2", "3"])
    roof.xaxis.set_minor_formatter(NullFormatter())
    roof.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def report(folder: Path) -> None:
    """Writes the table and the plots of what was measured."""
    measured = json.loads((folder / "kernels.json").read_text())
    cases = measured["cases"]
    order = {op: place for place, op in enumerate(dict.fromkeys(row["op"] for row in cases))}
    cases.sort(key=lambda row: (order[row["op"]], row["elements"], row["batch"]))
    first = cases[0]
    timed = "GPU time of a captured call, L2 cold" if "gpu_us_50" in first else "time of a call"
    text = f"""# Kernels on {first["device"]}

torch {first["torch"]}, triton {first["triton"]}, {first["threads"]} of {first["cores"]} CPU threads, commit
{measured["commit"]}, {measured["date"]}. Median {timed}; bfloat16 predictions,
float32 solver state; the fastest in bold.
Copy bandwidth in the same session: {first["copy_gb_per_s"]:.1f} GB/s (bytes read and written).

{table(cases)}

![bandwidth against size, and roofline](kernels.png)

`python benchmarks/kernels.py` makes this file and the plot.
"""
    (folder / "kernels.md").write_text(text)
    plot(cases, folder / "kernels.png")


def main() -> None:
    steps = sys.argv[1:] or ["bench", "report"]
    unknown = set(steps) - STEPS
    if unknown:
        sys.exit(f"unknown step {', '.join(sorted(unknown))}: expected test, tune, bench or report")
    folder = results_folder()
    status = run_pytest("tests/kernels", "-q") if "test" in steps else 0
    if "tune" in steps:
        if not torch.cuda.is_available():
            sys.exit("tune: block sizes are timed on a GPU, and there is none")
        tune(folder)
    if "bench" in steps:
        status = bench(folder) or status
    if "report" in steps:
        report(folder)
    sys.exit(status)


if __name__ == "__main__":
    main()
