"""`python -m dgpo_fast.evaluate`: images and scores of a pipeline or a run, and two of them side by side."""

import shlex
import time
from pathlib import Path

from dgpo_fast.config.command_line import INTERRUPTED, take_option
from dgpo_fast.config.help import print_settings
from dgpo_fast.config.reading import to_dict
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.settings import (
    OUTPUTS,
    EvaluationSettings,
    is_evaluation,
    is_run,
    read_settings,
    require_weights,
)
from dgpo_fast.run.console import Console
from dgpo_fast.wording import counted

PAIRS = 400
"""Pairs of pictures in a page, unless --pairs says otherwise; a page of that many 512 px pictures has some 50 MB."""

USAGE = f"""Draw and score images of a Stable Diffusion 3 pipeline or of a training run.

  python -m dgpo_fast.evaluate runs/NAME                          a run, on its held-out prompts and with its rewards
  python -m dgpo_fast.evaluate runs/NAME --weights before         the same with the weights before training
  python -m dgpo_fast.evaluate tiny --images 64                   a model that was not trained here
  python -m dgpo_fast.evaluate ./my_sd3 --lora my_lora.safetensors --prompts my.txt --rewards pickscore aesthetic
  python -m dgpo_fast.evaluate --side-by-side A B                 compare two evaluations or runs, image by image
  python -m dgpo_fast.evaluate --side-by-side runs/NAME           compare a run before and after training

--side-by-side writes one HTML page: evaluations/A-and-B.html, or the file given by --output. The page holds {PAIRS}
pairs of images, or the number given by --pairs.

For a model that is not a run, the defaults are those of a recipe: tiny-shapes for `tiny`, else sd35m-geneval, or the
one given by --recipe. After Ctrl-C or a kill, the same command continues the evaluation."""


def evaluate(args: list[str]) -> int:
    """Runs the command line's evaluation; returns the exit status."""
    args = list(args)
    if {"-h", "--help"} & set(args):
        print_settings(USAGE, EvaluationSettings())
        return 0
    if "--side-by-side" in args:
        return side_by_side(args)
    return run_evaluation(read_settings(args), args)


def run_evaluation(settings: EvaluationSettings, args: list[str]) -> int:
    """Draws, scores and reports; `args` say how to continue if that is interrupted."""
    require_weights(settings)
    from dgpo_fast.evaluation.drawing import (
        Drawing,
        named_faults,
    )  # after the command line is known to be good: these take seconds
    from dgpo_fast.evaluation.report import write_report

    console, started_s = Console(), time.monotonic()
    drawing = Drawing(settings, console)
    try:
        rows = drawing.run()
    except KeyboardInterrupt:
        command = shlex.join(["python", "-m", "dgpo_fast.evaluate", *args])
        done, total = len(drawing.folder.rows()), len(drawing.prompts)
        console.note(f"stopped: {done} of {total} images are drawn and scored; continue with: {command}")
        return INTERRUPTED
    if faults := named_faults(rows):
        number = sum(bool(row.fault) for row in rows)
        console.note(f"not finite, so not scored: {number} of {counted(len(rows), 'image')}: {faults}")
    if drawing.failures:
        failed = sum(row.failed and not row.fault for row in rows)
        console.note(
            f"not scored: {failed} of {len(rows)} images, which the same command tries again; "
            f"the first failure: {drawing.failures[0]}"
        )
    facts = {"drawn_count": drawing.drawn, "wall_s": time.monotonic() - started_s}
    write_report(drawing.folder, rows, console, facts)
    return 0


def side_by_side(args: list[str]) -> int:
    """Compares two evaluations; runs and models are evaluated first. Returns the exit status."""
    command = list(args)
    output, pairs = take_option(args, "output"), _whole_number("pairs", take_option(args, "pairs") or str(PAIRS))
    sources = take_sources(args)
    evaluations = [source if is_evaluation(source) else read_settings([source, *args]) for source in sources]
    if len(evaluations) == 1:
        if not is_run(sources[0]):
            raise UserError(f"--side-by-side {sources[0]}: is not a run, which has a before and an after; give two")
        evaluations = [read_settings([sources[0], *args, "--weights", when]) for when in ("before", "after")]
    if args and all(isinstance(evaluation, str) for evaluation in evaluations):
        raise UserError(f"command line: {args[0]}: has no effect, since both evaluations exist already")
    for evaluation in evaluations:
        if isinstance(evaluation, EvaluationSettings):
            require_weights(evaluation)

    from dgpo_fast.evaluation.drawing import require_folder
    from dgpo_fast.evaluation.folder import EvaluationFolder
    from dgpo_fast.evaluation.side_by_side import (
        print_totals,
        read_comparison,
        require_comparable,
        require_writable,
        write_page,
    )

    if output:
        require_writable(Path(output))
    made_with = [
        EvaluationFolder(Path(one)).made_with() if isinstance(one, str) else to_dict(one) for one in evaluations
    ]
    require_comparable([sources[0], sources[-1]], made_with)
    for evaluation in evaluations:
        if isinstance(evaluation, EvaluationSettings):
            require_folder(evaluation)
    for evaluation in evaluations:
        if isinstance(evaluation, EvaluationSettings) and (status := run_evaluation(evaluation, command)):
            return status
    folders = [Path(one if isinstance(one, str) else str(one.output)) for one in evaluations]
    comparison = read_comparison(*folders)
    page = Path(output) if output else OUTPUTS / f"{'-and-'.join(folder.resolve().name for folder in folders)}.html"
    if not output:
        OUTPUTS.mkdir(exist_ok=True)
    require_writable(page)
    console = Console()
    with console.track(f"writing {page}"):
        write_page(comparison, page, pairs)
    print_totals(comparison, console)
    console.note(f"the pictures, worst regressions first: open {page} in a browser")
    return 0


def take_sources(args: list[str]) -> list[str]:
    """Removes `--side-by-side A [B]` from `args` and returns A and B."""
    start = end = args.index("--side-by-side") + 1
    while end < len(args) and not args[end].startswith("-"):
        end += 1
    sources = args[start:end]
    if len(sources) not in (1, 2):
        raise UserError("command line: --side-by-side takes two evaluations, runs or models, or one run")
    del args[start - 1 : end]
    if args and not args[0].startswith("-"):
        raise UserError(f"command line: unexpected '{args[0]}' before --side-by-side")
    return sources


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise UserError(f"command line: --{name} {text}: give a whole number from 2 up")
    return int(text)
