"""Pictures of a run: before and after side by side, and the reward's curve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from dgpo_fast.evaluation.captions import drawable, fonts, wrapped
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.wording import counted

PAIRS_PER_ROW = 3
PAIRS = 12
SIGN_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50)
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
    looks = [line for line in metrics if "look/reward_mean" in line]
    figure = Figure(figsize=(7, 7 if looks else 4), layout="constrained", dpi=110)
    axis, *below = figure.subplots(2 if looks else 1, 1, sharex=True, squeeze=False)[:, 0]
    if looks:
        _signs(below[0], looks)
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
    axis.set(ylabel="mean reward")
    (below or [axis])[0].set(xlabel="iteration")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    _save(figure, path)


def _signs(axis: Axes, looks: list[Metrics]) -> None:
    """Signs of reward hacking over the base model's, on a logarithmic scale, and the iterations of alarms."""
    for name in [*(name for name in looks[-1] if name.startswith("look/") and name.endswith("_ratio")), "norm_ratio"]:
        points = [(look["iteration"], look[name]) for look in looks if look.get(name)]
        if points:
            # The norm is compared with what a KL term may ask for, and need not begin at 1.
            start = [] if name == "norm_ratio" else [(0, 1.0)]
            label = name.removeprefix("look/").removesuffix("_ratio").replace("_", " ")
            axis.plot(*zip(*start, *points, strict=True), marker=".", linewidth=1.2, label=label)
    alarmed = [look["iteration"] for look in looks if look.get("look/alarms")]
    for iteration in alarmed:
        named = "alarm" if iteration == alarmed[0] else None
        axis.axvline(iteration, color="#c62828", alpha=0.35, linewidth=3, label=named)
    axis.axhline(1, color=BEFORE, linewidth=0.8)
    axis.set(ylabel="over the base model's", yscale="log")
    axis.yaxis.set_major_locator(FixedLocator(SIGN_TICKS))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25)
    axis.figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=7, ncols=5
    )


def progress_strip(columns: Sequence[np.ndarray], labels: Sequence[str], captions: Sequence[str], path: Path) -> None:
    """The same prompts after more and more iterations: a column for each look, a row for each prompt.

    Args:
        columns: uint8 (rows · H, W, 3) each, pictures of the prompts one above the other.
        labels: of the columns.
        captions: the prompts.
        path: of the picture.
    """
    height, width = columns[0].shape[0] // len(captions), columns[0].shape[1]
    gap, unit = max(width // 16, 1), 0.9 / width
    rows = [column.reshape(len(captions), height, width, 3) for column in columns]
    framed = [np.pad(row, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for row in rows]
    whole = np.concatenate([frame.reshape(-1, width + gap, 3) for frame in framed], axis=1)
    figure = Figure(figsize=(unit * whole.shape[1] + 1.8, unit * whole.shape[0] + 0.6), layout="constrained", dpi=110)
    axis = figure.subplots()
    _show(axis, whole)
    axis.xaxis.tick_top()
    axis.set_xticks([(at + 0.5) * (width + gap) for at in range(len(columns))], labels, fontsize=7)
    texts = [wrapped(drawable(caption), 24, 4) for caption in captions]
    axis.set_yticks([(at + 0.5) * (height + gap) for at in range(len(captions))], texts, fontsize=6)
    for label, text in zip(axis.get_yticklabels(), texts, strict=True):
        label.set(fontfamily=fonts(text), parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
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
