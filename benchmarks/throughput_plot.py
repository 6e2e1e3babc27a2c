"""The plot of `throughput.json`: each baseline's iteration over ours, case by case."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"A": "#999999", "B": "#d08c2e", "C": "#3a7ca5", "C′": "#2a8c5a"}


def ratios(cases: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Median seconds of an iteration over ours, by case and baseline; cases without ours are left out."""
    found = {}
    for case, row in cases.items():
        systems = row.get("systems", {})
        medians = {name: system["seconds"]["iteration"][1] for name, system in systems.items() if "seconds" in system}
        if "ours" in medians:
            found[case] = {name: medians[name] / medians["ours"] for name in COLORS if name in medians}
    return found


def plot(cases: Mapping[str, Any], file: Path) -> None:
    """Writes bars, one group a case."""
    found = ratios(cases)
    figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
    width = 0.8 / len(COLORS)
    for place, (name, color) in enumerate(COLORS.items()):
        there = [(group, of[name]) for group, of in enumerate(found.values()) if name in of]
        bars = axis.bar([group + place * width for group, _ in there], [x for _, x in there], width, color=color)
        bars.set_label(name)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.axhline(1, color="black", linestyle="--", linewidth=1, label="ours")
    axis.set_xticks([group + 0.4 - width / 2 for group in range(len(found))], found, fontsize=8, rotation=15)
    axis.set(ylabel="seconds of an iteration, over ours")
    axis.legend(fontsize=8, ncols=len(COLORS) + 1)
    figure.savefig(file, dpi=110)
    plt.close(figure)
