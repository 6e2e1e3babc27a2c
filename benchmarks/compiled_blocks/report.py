"""The counts of one GPU as a dictionary for JSON, and as a table."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch

from benchmarks.compiled_blocks.gpus import GPU
from benchmarks.compiled_blocks.programs import BLOCKS, DECODER, PROGRAMS, counted
from dgpo_fast.errors import UserError
from dgpo_fast.profiling.machine import commit
from dgpo_fast.records import JsonObject

WHOLE = "whole"
PARTS = {
    "dual": "block with two attentions",
    "single": "block",
    "last": "last block",
    WHOLE: "**all 24 blocks**",
    DECODER: "decoder",
}
WEIGHTS = {
    "plain": "frozen, `engine.epilogue` off",
    "frozen": "frozen",
    "lora": "LoRA, `policy.forward` adapter",
    "merged": "LoRA, `policy.forward` merged",
    "full": "all trained",
}
DECODERS = {"plain": "frozen, `engine.decoder` fast", "frozen": "frozen, `engine.decoder` phases"}
HEAD = ("compiled graph", "weights", "rows", "fused kernels", "MB a sample", "library calls", "MB a sample", "both, MB")


def read(path: Path) -> JsonObject:
    """What an earlier call wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def counted_on(name: str, gpu: GPU, only: Sequence[str] | None = None) -> JsonObject:
    """Counts all programs, or `only` some of them. Raises UserError if one of these is unknown."""
    programs = {f"{program.part}.{program.weights}": program for program in PROGRAMS}
    unknown = [given for given in only or () if given not in programs]
    if unknown:
        raise UserError(f"--only {unknown[0]}: name some of {', '.join(programs)}")
    properties, rows = gpu.properties(name), []
    for key in only or programs:
        launches = asdict(counted(programs[key], properties))
        rows += [
            {**asdict(programs[key]), "direction": direction, **numbers}
            for direction, numbers in launches.items()
            if numbers is not None
        ]
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    return {name: {**about, "programs": rows}}


def table(report: JsonObject, gpu: str) -> str:
    """The counts of `gpu` as Markdown; where all kinds of block are there, also those of the whole transformer."""
    if gpu not in report:
        raise UserError(f"{gpu}: not counted yet; run python -m benchmarks.compiled_blocks '{gpu}'")
    rows, lines = report[gpu]["programs"], [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    kinds = dict.fromkeys((row["weights"], row["direction"]) for row in rows)
    for weights, direction in kinds:
        of_kind = [row for row in rows if (row["weights"], row["direction"]) == (weights, direction)]
        blocks = [row for row in of_kind if row["part"] in BLOCKS]
        lines += [_line(row["part"], row, _per_sample([row], [1])) for row in blocks]
        if len(blocks) == len(BLOCKS):
            lines.append(_line(WHOLE, blocks[0], _per_sample(blocks, [BLOCKS[row["part"]] for row in blocks])))
        lines += [_line(DECODER, row, _per_sample([row], [1])) for row in of_kind if row["part"] == DECODER]
    return "\n".join(lines)


def _per_sample(rows: Iterable[JsonObject], times: Iterable[int]) -> tuple[int, float, int, float]:
    """Fused kernels and their MB, library calls and theirs, of programs that run several times each."""
    sums = [0.0] * 4
    for row, count in zip(rows, times, strict=True):
        samples = row["rows"] * 1e6
        each = (row["fused"], row["fused_bytes"] / samples, row["library"], row["library_bytes"] / samples)
        sums = [total + count * number for total, number in zip(sums, each, strict=True)]
    return round(sums[0]), sums[1], round(sums[2]), sums[3]


def _line(part: str, row: JsonObject, numbers: tuple[int, float, int, float]) -> str:
    fused, fused_mb, library, library_mb = numbers
    cells = [
        f"{PARTS[part]}, {row['direction']}",
        DECODERS[row["weights"]] if part == DECODER else WEIGHTS[row["weights"]],
        str(row["rows"]),
        str(fused),
        f"{fused_mb:,.1f}",
        str(library),
        f"{library_mb:,.1f}",
        f"{fused_mb + library_mb:,.1f}",
    ]
    return f"| {' | '.join(cells)} |"
