"""Pictures of a run: before and after side by side, and the reward's curve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgpo_fast.evaluation.captions import drawable, fonts, wrapped
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.wording import counted

PAIRS_PER_ROW = 3
PAIRS = 12
BEFORE, AFTER = "#8a8f98", "#1f6feb"


def before_after_grid(before: Evaluation, after: Evaluation, path: Path, pairs: int = PAIRS) -> None:
    """The first `pairs` prompts, each from the same initial noise before and after training, with its rewards."""
    pairs = min(pairs, len(before.prompts))
    rows = -(-pairs // PAIRS_PER_ROW)
    width, height = _inches(before.images[0], 1.6)
    figure_size = ((2 * width + 0.2) * PAIRS_PER_ROW, (height + 0.75) * rows + 0.3)
    figure = Figure(figsize=figure_size, layout="constrained", dpi=110)
    blocks = np.ravel(figure.subfigures(rows, PAIRS_PER_ROW, squeeze=False, wspace=0.04, hspace=0.02))
    for index, block in enumerate(blocks):
        if index >= pairs:
            continue
        caption = wrapped(drawable(before.prompts[index].text), round(38 * width / 1.6), 2)
        block.suptitle(caption, fontsize=9, fontfamily=fonts(caption), parse_math=False)
        for axis, result, label in zip(block.subplots(1, 2), (before, after), ("before", "after"), strict=True):
            _show(axis, result.images[index])
            axis.set_xlabel(f"{label}  {result.rewards[index]:.2f}", fontsize=9)
            for spine in axis.spines.values():
                spine.set_color(AFTER if label == "after" else BEFORE)
                spine.set_linewidth(1.5)
    _save(figure, path)


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], path: Path, per_row: int = 8) -> None:
    """Pictures, uint8 (H, W, 3), in rows, each with its caption below, of which the last line is always shown."""
    per_row = min(per_row, len(pictures))
    rows = -(-len(pictures) // per_row)
    width, height = _inches(pictures[0], 1.7)
    figure = Figure(figsize=(width * per_row, (height + 0.55) * rows), layout="constrained", dpi=110)
    axes = np.ravel(figure.subplots(rows, per_row, squeeze=False))
    for axis in axes[len(pictures) :]:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, pictures, captions, strict=False):
        _show(axis, image)
        text, _, score = drawable(caption).rpartition("\n")
        caption = f"{wrapped(text, round(28 * width / 1.7), 3)}\n{score}".strip()
        axis.set_xlabel(caption, fontsize=7, fontfamily=fonts(caption), parse_math=False)
    _save(figure, path)


def reward_curve(metrics: list[Metrics], evaluations: list[tuple[int, JsonObject]], evaluated: str, path: Path) -> None:
    """Mean reward of each iteration's images, and of the evaluations, with their 95 % intervals.

    Args:
        metrics: the lines of `metrics.jsonl`.
        evaluations: iterations and summaries.
        evaluated: what these are of, as in "held-out prompts".
        path: of the picture.
    """
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
    axis = figure.subplots()
    points = [(line["iteration"], line["reward_mean"]) for line in metrics if line.get("reward_mean") is not None]
    if points:
        iterations, rewards = np.array(points, dtype=float).T
        axis.plot(iterations, rewards, color=BEFORE, linewidth=1, alpha=0.6, label="training images")
        width = max(1, len(rewards) // 10)
        smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")
        axis.plot(
            iterations[width - 1 :], smooth, color=BEFORE, linewidth=2, label=f"mean of {counted(width, 'iteration')}"
        )
    steps = [step for step, _ in evaluations]
    means = [summary["reward_mean"] for _, summary in evaluations]
    errors = [mean - summary["reward_ci95"][0] for mean, (_, summary) in zip(means, evaluations, strict=True)]
    axis.errorbar(steps, means, yerr=errors, color=AFTER, marker="o", capsize=4, linewidth=2, label=evaluated)
    axis.set(xlabel="iteration", ylabel="mean reward")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    _save(figure, path)


def _inches(image: np.ndarray, side: float) -> tuple[float, float]:
    """Width and height of a picture (H, W, 3) with the area of a square of `side`; captions need some width."""
    ratio = image.shape[0] / image.shape[1]
    width = max(side / ratio**0.5, 0.7 * side)
    return width, width * ratio


def _show(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image, interpolation="nearest" if max(image.shape) <= 64 else "antialiased")
    axis.set(xticks=[], yticks=[])


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(path)
