"""The figures: reward and image quality, each against seconds, forwards and the distance from the base, with the seeds'
95 % intervals as bands."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compare.curves import curve, reach
from benchmarks.compare.systems import SYSTEMS

# Colours that people with any colour vision tell apart (Okabe and Ito), and line styles for print.
STYLES = {
    "dgpo": ("#0072b2", "-"),
    "nft": ("#e69f00", "-"),
    "awm": ("#56b4e9", "-"),
    "ram": ("#cc79a7", "--"),
    "crd": ("#000000", "-"),
    "flow-grpo": ("#009e73", "-"),
    "flow-grpo-fast": ("#009e73", "--"),
    "dpo": ("#d55e00", "-"),
    "dgpo-offline": ("#56b4e9", "--"),
    "dpo-offline": ("#e69f00", "--"),
    "dgpo-sde": ("#cc79a7", "-"),
    "dgpo-no-clip": ("#000000", "-."),
    "dgpo-high-noise": ("#0072b2", "-"),
    "dgpo-all-noise": ("#000000", "-."),
    "dgpo-half": ("#d55e00", "-"),
    "dgpo-quarter": ("#e69f00", "-"),
    "dgpo-half-drawn": ("#009e73", "--"),
}
BASE = "#8a8f98"
FIGURES = {
    "rivals": (
        "Objectives at equal compute",
        ("dgpo", "nft", "awm", "ram", "crd", "flow-grpo-fast", "flow-grpo", "dpo"),
    ),
    "speed": ("DGPO, Flow-GRPO and Diffusion-DPO", ("dgpo", "flow-grpo", "dpo")),
    "online_offline": ("Online and offline data", ("dgpo", "dgpo-offline", "dpo", "dpo-offline")),
    "ode_sde": ("Rollouts without and with noise", ("dgpo", "dgpo-sde", "flow-grpo")),
    "timestep_clip": ("With and without the timestep clip", ("dgpo", "dgpo-no-clip")),
    "clip": ("With and without the timestep clip, off the grid", ("dgpo-high-noise", "dgpo-all-noise")),
    "part_of_group": ("Training on part of each group", ("dgpo", "dgpo-half", "dgpo-quarter", "dgpo-half-drawn")),
}
LABELS = {
    "training_s": "training time [{seconds}]",
    "training_forwards": "work of the transformers [forwards of an image]",
    "distance": "distance from the base, mean (v − v_base)²",
    "reward_mean": "mean reward on held-out prompts",
    "patch_distance": "patch distance to rendered pictures\n[grey levels, lower is better]",
}

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def draw_figures(study: str, runs: Runs, base: Mapping[str, Any], folder: Path, seconds: str) -> list[str]:
    """Writes a study's figures that have two systems at least; returns the files' names. `seconds` says which."""
    names = []
    for name, (title, systems) in FIGURES.items():
        shown = [system for system in systems if system in runs]
        if (name == "rivals") != (study == "rivals"):
            continue
        if len(shown) > 1:
            _draw(title, shown, runs, base, folder / f"{name}.png", seconds)
            names.append(f"{name}.png")
    return names


def _draw(title: str, systems: list[str], runs: Runs, base: Mapping[str, Any], path: Path, seconds: str) -> None:
    figure = Figure(figsize=(16, 8.5), layout="constrained", dpi=100)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    panels = product(("reward_mean", "patch_distance"), ("training_s", "training_forwards", "distance"))
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
    until = runs[0]["run"]["seconds"] if spent == "training_s" else reach(runs, spent)
    color, style = STYLES[system]
    line = curve(runs, base, measure, spent, until)
    axis.plot(line.x, line.mean, color=color, linestyle=style, linewidth=2, label=SYSTEMS[system].label)
    axis.fill_between(line.x, line.mean - line.half, line.mean + line.half, color=color, alpha=0.12, linewidth=0)
