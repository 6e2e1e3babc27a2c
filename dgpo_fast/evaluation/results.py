"""The results of a run: scores before and after, summary, pictures, and the last lines that it prints."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

from safetensors import SafetensorError

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.captions import missing_note
from dgpo_fast.evaluation.figures import PAIRS, before_after_grid, reward_curve
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.run.console import Console, duration
from dgpo_fast.run.depends import change, changed
from dgpo_fast.run.metrics import read_metrics, write_json
from dgpo_fast.wording import counted, one_line, resume_command

BEFORE_FILE, AFTER_FILE = "evaluation_before.npz", "evaluation_after.npz"


def earlier_evaluation(path: Path, contents: dict[str, str], note: Callable[[str], None]) -> Evaluation | None:
    """The evaluation that an earlier start of the run has saved. None if there is none, or, with a note, if it is
    damaged or was scored by rewards with other `contents` (`WeightedReward.contents`)."""
    if not path.is_file():
        return None
    try:
        earlier = Evaluation.load(path)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        note(f"{path} is damaged and is made again: {' '.join(str(error).split())}")
        return None
    before = contents if earlier.contents is None else earlier.contents
    names = changed({name: before.get(name) for name in {**before, **contents}}, contents)
    if not names:
        return earlier
    note(change(path, names, "it was written", "the original model is scored again"))
    return None


def write_results(
    folder: Path,
    before: Evaluation,
    after: Evaluation,
    config: Config,
    source: JsonObject,
    iteration: int,
    console: Console,
    evaluated: str,
) -> None:
    """Writes scores, summary and pictures, and shows them.

    Args:
        folder: the run's, with its `metrics.jsonl`.
        before, after: scores of the original and of the trained model.
        config: the run's.
        source: the summary of the groups' source, and of the looks.
        iteration: number of finished iterations.
        console: shows the table and the last lines.
        evaluated: the prompts of before and after, as in "held-out prompts".
    """
    after.save(folder / AFTER_FILE)
    lines = read_metrics(folder / "metrics.jsonl")
    summary = {
        "recipe": config.recipe,
        "seed": config.seed,
        "iterations": iteration,
        "training_images": sum(line["images_count"] for line in lines),
        "training_s": sum(line["iteration_s"] for line in lines),
        **source,
        "groups_dropped_count": sum(line["groups_dropped_count"] for line in lines),
        "images_not_finite_count": sum(line.get("images_not_finite_count", 0) for line in lines),
        "evaluated_on": evaluated,
        "before": before.summary(),
        "after": after.summary(),
        "gain": after.gain(before),
    }
    write_json(folder / "summary.json", summary)
    console.before_after(summary["before"], summary["after"], summary["gain"], evaluated)
    before_after_grid(before, after, folder / "before_after.png")
    if note := missing_note(prompt.text for prompt in before.prompts[:PAIRS]):
        console.note(note)
    middle = [
        (line["iteration"], {key.removeprefix("heldout_"): value for key, value in line.items()})
        for line in lines
        if "heldout_reward_mean" in line and line["iteration"] <= iteration
    ]
    evaluations = [(0, summary["before"]), *middle, (iteration, summary["after"])]
    reward_curve(lines, evaluations, evaluated, folder / "reward_curve.png")
    for line in last_lines(summary, lines, config.rollout.group_size, folder):
        console.note(line)


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Raises UserError if the block cannot write to the run's folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise UserError(
            f"{folder}: results could not be saved ({reason}); free space, then resume with: {resume_command(folder)}"
        ) from None


def last_lines(summary: JsonObject, metrics: list[Metrics], group_size: int, folder: Path) -> list[str]:
    """The lines below a run's final table: what was learned and lost, where results are, and how to view them.

    Args:
        summary: what `summary.json` holds.
        metrics: the lines of `metrics.jsonl`.
        group_size: G.
        folder: the run's.
    """
    iterations = counted(summary["iterations"], "iteration")
    groups, lost = summary["training_images"] // group_size, summary["groups_dropped_count"]
    shares = [line["groups_equal_share"] for line in metrics if line["groups_equal_share"] is not None]
    trained = f"trained {iterations} in {duration(summary['training_s'])}; "
    trained += f"weights, pictures and metrics are in {folder}"
    lines = [f"{trained}; {lost} of {counted(groups, 'group')} were lost" if lost else trained]
    if shares and min(shares) == 1:
        lines.insert(0, f"every group of {iterations} had equal rewards: nothing was learnt from them")
    return [*lines, f"look: python -m dgpo_fast.evaluate --side-by-side {shlex.quote(str(folder))}"]
