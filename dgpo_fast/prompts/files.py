"""Prompt files: `.txt` (one prompt a line), `.jsonl` (GenEval's format: one object a line), and `.csv` and `.tsv` (as
DrawBench's and PartiPrompts': a table with a column of prompts)."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import NEGATIVE_KEY, TRAINING_PROMPTS, Prompt, PromptSets, shorten, without
from dgpo_fast.records import JsonObject, refuse_constant
from dgpo_fast.wording import counted

MAX_LINE_BYTES = 100_000
CONTENTS = {
    ".txt": "one prompt a line",
    ".jsonl": "one JSON object a line",
    ".csv": 'the line "prompt,tag", and a prompt with its tag in each line below',
    ".tsv": "the line prompt⇥tag, and a prompt with its tag in each line below",
}
SUFFIXES = tuple(CONTENTS)
KINDS = "a .txt, .jsonl, .csv or .tsv file"
TABLES = (".csv", ".tsv")
COLUMNS = {
    "prompt": "prompt",
    "prompts": "prompt",
    "tag": "tag",
    "category": "tag",
    NEGATIVE_KEY: NEGATIVE_KEY,
    "negative prompt": NEGATIVE_KEY,
}
"""What these three columns of a table may be called, in any case. All others keep their names."""
SEPARATORS = ",;\t"
LINE_ENDS = re.compile("[\v\f\x1c-\x1e\x85\u2028\u2029]")
"""End a line of text beside CR and LF. In JSON they may stand inside a string."""

FEW_HELD_OUT = 10
"""With fewer held-out prompts than this, the run prints a note: means over them say little."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a `.txt`, `.jsonl` or `.csv` file in file order, repetitions included; blank lines are skipped.

    Raises:
        UserError: one line that names the file, the line if there is one, and the remedy.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder: name {KINDS} in it")
    if not os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        raise UserError(f"{path}: no such prompt file: check the path (the working folder is {Path.cwd()})")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path}: unknown kind of prompt file: use .txt (one prompt a line), .jsonl (GenEval), .csv (DrawBench) or "
            ".tsv (PartiPrompts)"
        )
    lines = ((line, f"{path}:{number}") for number, line in numbered_lines(path))
    parse: Callable[[str, str], Prompt] = parse_json if path.suffix == ".jsonl" else _parse_text
    if path.suffix in TABLES:
        parse = _table_parser(*next(lines, ("prompt", "")))
    prompts = [parse(line, origin) for line, origin in lines]
    if not prompts:
        raise UserError(f"{path}: holds no prompts: write {CONTENTS[path.suffix]}")
    return prompts


def split_held_out(prompts: list[Prompt], size: int) -> PromptSets:
    """Splits off up to `size` distinct prompts, a fifth at most, for evaluation.

    The choice only depends on the prompts (smallest SHA-256 of what they ask for), not on a seed or their order. Runs
    with different seeds are therefore evaluated on the same prompts, and shuffling a file changes nothing.
    """
    distinct = in_hash_order(prompts)
    if len(distinct) < 5:
        note = f"too few prompts to hold any out ({len(distinct)}): evaluation uses the training prompts"
        return PromptSets(train=prompts, held_out=distinct, note=note, evaluated=TRAINING_PROMPTS)
    held_out = distinct[: min(size, len(distinct) // 5)]
    sets = PromptSets(train=without(prompts, held_out), held_out=held_out)
    if len(held_out) >= min(size, FEW_HELD_OUT):
        return sets
    few = f"{counted(len(held_out), 'held-out prompt')} (of {len(distinct)})"
    return replace(sets, note=f"evaluation uses {few}: name more with --eval-prompts", evaluated=few)


def in_hash_order(prompts: list[Prompt]) -> list[Prompt]:
    """The distinct ones of `prompts` (by text and by content, first one kept), in an order set by their hashes."""
    by_text = {p.text: p for p in reversed(prompts)}
    by_content = {p.content: p for p in by_text.values()}
    return sorted(by_content.values(), key=lambda p: hashlib.sha256(p.content.encode()).hexdigest())


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers, which count from 1; holds a bounded part of the file at a time."""
    number = 0
    try:
        with path.open("rb") as file:
            for offset, raw in _raw_lines(file):
                text = _decode(raw, f"{path}:{number + 1}", offset)
                for line in [text] if path.suffix == ".jsonl" else LINE_ENDS.split(text):
                    number += 1
                    if line.strip():
                        yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Position and content of each line, which ends with LF, CR LF or CR; of one that is too long, its beginning."""
    offset, held = 0, b""
    while True:
        more = file.read(MAX_LINE_BYTES)
        lines = (held + more).splitlines(keepends=True)
        # A CR at the end of what was read may be the first half of CR LF.
        held = lines.pop() if more and not lines[-1].endswith(b"\n") else b""
        for line in lines:
            yield offset, line.rstrip(b"\r\n")
            offset += len(line)
        if len(held) > MAX_LINE_BYTES + 1:
            yield offset, held
            return
        if not more:
            return


def _decode(raw: bytes, origin: str, offset: int) -> str:
    """One line as text; `offset` is the position of its first byte in the file."""
    if len(raw) > MAX_LINE_BYTES:
        raise UserError(f"{origin}: line longer than {MAX_LINE_BYTES} bytes: is this a prompt file?")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise UserError(f"{origin}: not UTF-8 at byte {position} of the file: save the file as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{origin}: holds a NUL character: save the file as UTF-8 text")
    # Editors on Windows put a byte order mark in front of a file, and files may have been joined.
    return text.removeprefix("\ufeff")


def _parse_text(line: str, origin: str) -> Prompt:
    return Prompt(line.strip(), {}, origin)


def parse_json(line: str, origin: str) -> Prompt:
    """The prompt in a line of a `.jsonl` file, the whole object being its metadata. Raises UserError, which begins with
    `origin`."""
    if line.lstrip().startswith("["):
        raise UserError(f"{origin}: is a JSON list: write one object a line, without [ ]")
    try:
        record = json.loads(
            line, object_pairs_hook=_without_repeated_keys, parse_constant=refuse_constant, parse_float=_finite
        )
        json.dumps(record, ensure_ascii=False).encode()  # as the run will write it, keys and all
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{origin}: holds half a character ({half}): write the letter itself") from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{origin}: broken JSON ({reason}): write one JSON object a line") from error
    if not isinstance(record, dict):
        raise UserError(f'{origin}: not a JSON object: write {{"prompt": "…", …}}')
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{origin}: lacks "prompt", a non-empty string: write {{"prompt": "…", …}}')
    if "\0" in text:
        raise UserError(f'{origin}: "prompt" holds a NUL character: leave it out')
    if not isinstance(record.get("tag", ""), str):
        raise UserError(f'{origin}: "tag" is no string: write a name, as in "tag": "counting"')
    negative = record.get(NEGATIVE_KEY)
    if negative is not None and not isinstance(negative, str):
        raise UserError(f'{origin}: "{NEGATIVE_KEY}" is no string: write a text, as in "{NEGATIVE_KEY}": "blurry"')
    if "\0" in (negative or ""):
        raise UserError(f'{origin}: "{NEGATIVE_KEY}" holds a NUL character: leave it out')
    return Prompt(text.strip(), record, origin, (negative or "").strip())


def _table_parser(line: str, origin: str) -> Callable[[str, str], Prompt]:
    """What reads the lines below `line`, which names the columns and shows what separates them."""
    separator = max(SEPARATORS, key=line.count)
    header = _cells(line, origin, separator)
    columns = [COLUMNS.get(name.lower(), name) for name in header]
    if columns.count("prompt") != 1 or columns.count("tag") > 1:
        wanted = 'one must be "prompt" (or "Prompts"), and at most one "tag" (or "Category")'
        raise UserError(f"{origin}: names the columns {shorten(', '.join(header))}: {wanted}")
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{origin}: two columns are called {shorten(twice)}: rename one of them")

    def parse(line: str, origin: str) -> Prompt:
        cells = _cells(line, origin, separator)
        if len(cells) != len(columns):
            seen = f"{counted(len(cells), 'cell')} below {counted(len(columns), 'column')}"
            held = f"write a prompt that holds {'commas' if separator == ',' else 'semicolons'} between double quotes"
            remedy = "leave tabs out of the prompt" if separator == "\t" else held
            raise UserError(f"{origin}: {seen}: {remedy}")
        # A column without a name numbers the lines.
        record: JsonObject = {name: cell for name, cell in zip(columns, cells, strict=True) if name}
        empty = next((name for name in ("prompt", "tag") if not record.get(name, name)), None)
        if empty is not None:
            named = header[columns.index(empty)]
            raise UserError(f"{origin}: nothing in the column {shorten(named)}: fill it in, or remove the line")
        # An empty cell gives none, as null does in a .jsonl.
        record |= {NEGATIVE_KEY: record[NEGATIVE_KEY] or None} if NEGATIVE_KEY in record else {}
        return Prompt(record["prompt"], record, origin, record.get(NEGATIVE_KEY) or "")

    return parse


def _cells(line: str, origin: str, separator: str) -> list[str]:
    """The cells of a line of a table, without blanks around them; a cell never goes on in the next line.

    Between tabs, a double quote is a letter like any other, as in PartiPrompts.
    """
    line = line.strip(" \r\n")
    if separator == "\t":
        return [cell.strip() for cell in line.split("\t")]
    try:
        (cells,) = csv.reader([line], delimiter=separator, strict=True)
    except csv.Error as error:
        remedy = "end each cell on its line, and double the quotes inside quotes"
        raise UserError(f"{origin}: broken CSV ({error}): {remedy}") from error
    return [cell.strip() for cell in cells]


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """A JSON object; the second of two equal keys would silently win otherwise."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shorten(next(key for key in keys if keys.count(key) > 1))} occurs twice")
    return record


def _finite(number: str) -> float:
    """A JSON number with a point or an exponent; Python would take 1e999 for infinity, which JSON has not."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(number)} is beyond all numbers")
    return value
