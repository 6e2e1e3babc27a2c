"""What each model needs on small cards, by prediction: the table of docs/performance.md.

    python -m benchmarks.cards [--table]

Plans the LoRA recipe of some models for cards of 16 and 24 GB as `--card` does: the settings that are taken, what each
saves, and what the memory at the peak is made of. Nothing is run or downloaded. Takes a few minutes on a CPU; writes
`benchmarks/results/cards.json` and the table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import PERFORMANCE, replace_part
from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.memory.cards import plan_on
from dgpo_fast.models.loading import read_model

RESULT = Path(__file__).parent / "results/cards.json"
RECIPES = ("sd35m-ocr", "flux2-klein-base-4b-ocr", "z-image-ocr", "flux1-dev-ocr", "qwen-image-ocr")
CARDS_GB = (16, 24)
GIB = 2**30


def row(recipe: str, card_gb: int) -> dict[str, Any]:
    """A recipe on a card."""
    config = configure([recipe, "--random-weights", "--card", f"{card_gb}GB"])
    about = {"recipe": recipe, "model": config.model, "card_gb": card_gb}
    try:
        plan = plan_on(config, read_model(config), torch.bfloat16)
    except UserError as error:
        return {**about, "error": str(error)}
    prediction = plan.prediction
    return {
        **about,
        "available_gib": plan.available / GIB,
        "taken": [
            {"saving": str(one.saving), "exact": one.saving.exact, "saves_gib": one.saves / GIB} for one in plan.taken
        ],
        "micro_batch": plan.config.policy.micro_batch_size,
        "peak_gib": prediction.peak / GIB,
        "peak_phase": prediction.peak_phase,
        "phase_gib": prediction.phases[prediction.peak_phase] / GIB,
        "held_gib": {name: nbytes / GIB for name, nbytes in prediction.held.items()},
        "proposed": plan.proposed,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown: a line for each recipe and card."""
    head = ["recipe", "card", "taken, and GiB saved by each", "micro-batch", "predicted peak, GiB", "made of"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in rows:
        cells = [f"`{one['recipe']}`", f"{one['card_gb']} GB"]
        if "error" in one:
            lines.append(f"| {' | '.join([*cells, one['error'].removeprefix('card: '), '', '', ''])} |")
            continue
        taken = [
            f"{'' if t['exact'] else '**inexact** '}{_code(t['saving'])} {t['saves_gib']:.1f}" for t in one["taken"]
        ]
        less = f"; at {one['proposed']} pixels exact savings would do" if one["proposed"] else ""
        held = sorted(one["held_gib"].items(), key=lambda item: -item[1])
        parts = [f"{name} {gib:.1f}" for name, gib in held if gib >= 0.05]
        made_of = ", ".join([f"{one['peak_phase']} {one['phase_gib']:.1f}", *parts])
        peak = f"{one['peak_gib']:.1f} of {one['available_gib']:.1f}"
        cells += [(", ".join(taken) or "nothing") + less, str(one["micro_batch"]), peak, made_of]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _code(saving: str) -> str:
    return f"`{saving}`" if saving.startswith("--") else saving


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table of the result that is there")
    options = parser.parse_args(args)
    if not options.table:
        rows = [row(recipe, card_gb) for recipe in RECIPES for card_gb in CARDS_GB]
        RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    replace_part("cards", table(json.loads(RESULT.read_text(encoding="utf-8"))), PERFORMANCE)


if __name__ == "__main__":
    main()
