"""Prompts to train and to evaluate on: shipped generators, a text file, a GenEval `.jsonl` or a table."""

from __future__ import annotations

import difflib
import importlib
import os
from dataclasses import replace
from pathlib import Path

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.prompts.files import KINDS, SUFFIXES, in_hash_order, read_prompts, split_held_out
from dgpo_fast.prompts.geneval import require_geneval_metadata
from dgpo_fast.prompts.prompt import (
    HELD_OUT,
    TRAINING_PROMPTS,
    Prompt,
    PromptSets,
    in_turn,
    quoted_text,
    require_quoted_text,
    with_negative,
    without,
)

__all__ = [
    "TRAINING_PROMPTS",
    "Prompt",
    "PromptSets",
    "evaluation_prompts",
    "in_turn",
    "load_prompts",
    "load_run_prompts",
    "quoted_text",
    "require_geneval_metadata",
    "require_quoted_text",
    "with_negative",
]


# One line per generator: a function of the number of held-out prompts, whose module is imported when first asked for.
GENERATORS = {
    "geneval": "dgpo_fast.prompts.geneval:geneval_prompts",
    "signs": "dgpo_fast.prompts.signs:sign_prompts",
    "tiny-shapes": "dgpo_fast.tiny.prompts:shape_prompts",
    "tiny-signs": "dgpo_fast.tiny.prompts:sign_prompts",
}


def load_run_prompts(config: Config, *, held_out: int = 0) -> PromptSets:
    """The prompts of a run of `config`, with their negative prompts; as many to evaluate on as it evaluates, or
    `held_out` if these are more. Raises UserError as `load_prompts`."""
    count = max(held_out, config.evaluation.images)
    if config.data.source == "preferences":
        from dgpo_fast.prompts.preferences import run_preferences  # its imports take as long as all others here

        sets = run_preferences(config)[2]
        if config.eval_prompts is None:
            return sets
        shown = with_negative(_to_evaluate(config.eval_prompts, count)[:count], config.rollout.negative_prompt)
        return replace(sets, held_out=shown, evaluated=HELD_OUT)
    sets = load_prompts(config.prompts, eval_source=config.eval_prompts, held_out=count)
    train, evaluation = (with_negative(some, config.rollout.negative_prompt) for some in (sets.train, sets.held_out))
    return replace(sets, train=train, held_out=evaluation)


def load_prompts(source: str, *, eval_source: str | None = None, held_out: int = 256) -> PromptSets:
    """Loads the prompts to train on and the prompts to evaluate on.

    Args:
        source: a generator (`geneval`, `signs`, `tiny-shapes`, `tiny-signs`) or the path of a `.txt`, `.jsonl`
            `.csv` or `.tsv` file.
        eval_source: where the evaluation prompts come from, named alike. Without it, a generator gives its own and a
            file's are split off, a fifth of it at most.
        held_out: number of evaluation prompts at most, ≥ 1.

    All prompts of `eval_source`, also those beyond `held_out`, are kept out of training. Nothing here depends on a
    run's seed: every run of one configuration trains on the same list and is evaluated on the same prompts.

    Raises:
        UserError: one line naming the file, the line number if there is one, and the remedy.
    """
    if held_out < 1:
        raise UserError(f"held_out must be at least 1, got {held_out}")
    if eval_source is None:
        if source in GENERATORS:
            return _generated(source, held_out)
        return split_held_out(_read(source), held_out)
    return _with_evaluation_from(source, eval_source, held_out)


def evaluation_prompts(source: str, count: int | None) -> list[Prompt]:
    """Prompts to evaluate on, nothing being trained: all of a file in its order, or what a generator holds out.

    Args:
        source: as for `load_prompts`.
        count: of a generator, the number of prompts at most.

    Raises UserError, one line.
    """
    if source not in GENERATORS:
        return _read(source)
    if count is None:
        raise UserError(f"--prompts {source}: a generator has no end: say how many, as in --images 512")
    return _generated(source, count).held_out


def _with_evaluation_from(source: str, eval_source: str, held_out: int) -> PromptSets:
    training = _generated(source, held_out).train if source in GENERATORS else _read(source)
    evaluation = _to_evaluate(eval_source, held_out)
    train = without(training, evaluation)
    if not train:
        raise UserError(f"{source}: every prompt is also in {eval_source}: name a different file for evaluation")
    note = ""
    if len(evaluation) > held_out:
        note = f"evaluation uses {held_out} of the {len(evaluation)} prompts in {eval_source}"
    return PromptSets(train=train, held_out=evaluation[:held_out], note=note)


def _to_evaluate(source: str, held_out: int) -> list[Prompt]:
    """All prompts of a file, in the order of their hashes, or those that a generator holds out."""
    return _generated(source, held_out).held_out if source in GENERATORS else in_hash_order(_read(source))


def _generated(name: str, held_out: int) -> PromptSets:
    module, _, function = GENERATORS[name].partition(":")
    return getattr(importlib.import_module(module), function)(held_out)


def _read(source: str) -> list[Prompt]:
    """The prompts of a file; a word that is neither a generator nor looks like a path is taken for a misspelt one."""
    path = Path(source).expanduser()
    if not os.path.exists(path) and path.suffix not in SUFFIXES and len(path.parts) < 2:
        files = [source + suffix for suffix in SUFFIXES if os.path.exists(f"{path}{suffix}")]
        close = files or difflib.get_close_matches(source, GENERATORS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(GENERATORS)
        raise UserError(f"no prompt source {source!r}: {hint}Name one of {known}, or {KINDS}")
    return read_prompts(path)
