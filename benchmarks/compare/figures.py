"""The figures: reward and image quality, each against seconds and images, with the seeds' 95 % intervals as bands."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compare.curves import curve
from benchmarks.compare.systems import SYSTEMS

# Colours that people with any colour vision tell apart (Okabe and Ito), and line styles for print.
STYLES = {
    "dgpo": ("#0072b2", "-"),
    "dgpo-offline": ("#56b4e9", "--"),
    "dpo": ("#d55e00", "-"),
    "dpo-offline": ("#e69f00", "--"),
    "flow-grpo": ("#009e73", "-"),
    "dgpo-sde": ("#cc79a7", "-"),
    "dgpo-no-clip": ("#000000", "-."),
}
BASE = "#8a8f98"
FIGURES = {
    "speed": ("DGPO, Flow-GRPO and Diffusion-DPO", ("dgpo", "flow-grpo", "dpo")),
    "online_offline": ("Online and offline data", ("dgpo", "dgpo-offline", "dpo", "dpo-offline")),
    "ode_sde": ("Rollouts without and with noise", ("dgpo", "dgpo-sde", "flow-grpo")),
    "timestep_clip": ("With and without the timestep clip", ("dgpo", "dgpo-no-clip")),
}
LABELS = {
    "training_s": "training time [{seconds}]",
    "trained_images": "images gone through in training",
    "reward_mean": "mean reward on held-out prompts",
    "patch_distance": "patch distance to rendered pictures\n[grey levels, lower is better]",
}

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def draw_figures(runs: Runs, base: Mapping[str, Any], folder: Path, seconds: str) -> list[str]:
    """Writes every figure that has at least two of its systems; returns the files' names. `seconds` says which."""
    names = []
    for name, (title, systems) in FIGURES.items():
        shown = [system for system in systems if system in runs]
        if len(shown) > 1:
            _draw(title, shown, runs, base, folder / f"{name}.png", seconds)
            names.append(f"{name}.png")
    return names


def _draw(title: str, systems: list[str], runs: Runs, base: Mapping[str, Any], path: Path, seconds: str) -> None:
    figure = Figure(figsize=(11.5, 8), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    panels = product(("reward_mean", "patch_distance"), ("training_s", "trained_images"))
    for axis, (measure, spent) in zip(axes.flat, panels, strict=True):
        for system in systems:
            _line(axis, system, runs[system], base, measure, spent)
        axis.axhline(base[measure], color=BASE, linewidth=1, linestyle=":", label="the model as it came")
        axis.set(xlabel=LABELS[spent].format(seconds=seconds), ylabel=LABELS[measure], xlim=(0, None))
        axis.locator_params(axis="x", nbins=6)  # long numbers have room
        axis.grid(alpha=0.25)
        axis.label_outer()
    count = len(next(iter(runs.values())))
    axes[0, 0].legend(frameon=False, fontsize=9, title=f"mean of {count} seeds, 95 % interval", title_fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def _line(
    axis: Axes, system: str, runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any], measure: str, spent: str
) -> None:
    until = runs[0]["run"]["seconds"] if spent == "training_s" else min(run["points"][-1][spent] for run in runs)
    color, style = STYLES[system]
    line = curve(runs, base, measure, spent, until)
    axis.plot(line.x, line.mean, color=color, linestyle=style, linewidth=2, label=SYSTEMS[system].label)
    axis.fill_between(line.x, line.mean - line.half, line.mean + line.half, color=color, alpha=0.15, linewidth=0)
