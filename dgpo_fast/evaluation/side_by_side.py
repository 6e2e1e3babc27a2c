"""Two evaluations of the same prompts from the same noise as one page: offline, with the pictures in it.

The page is `page.html` with `page.js` and a JSON block. Prompts and names are only ever in that block, where no `<` is
left, and reach the document as text.
"""

import base64
import hashlib
import html
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from rich.markup import escape
from rich.table import Table

from dgpo_fast.config.bounds import size_of
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.folder import EvaluationFolder, Row, describe_model
from dgpo_fast.evaluation.report import SUM, column, decimals, score_names, with_interval
from dgpo_fast.evaluation.statistics import Mean
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards.registry import parse_spec
from dgpo_fast.rewards.weighted import CONTENT
from dgpo_fast.run.console import Console
from dgpo_fast.run.metrics import finite
from dgpo_fast.wording import FEWEST_PROMPTS, counted, number, size_in_words

TEMPLATE, SCRIPT = Path(__file__).with_name("page.html"), Path(__file__).with_name("page.js")
MARK = '<meta name="generator" content="dgpo_fast side by side">'
LOSSLESS_PX = 64
"""Pictures up to this size are shown as they are; larger ones as WebP, which the eye cannot tell from them."""
WEBP_QUALITY = 88
THREADS = 8


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, A and B, picture by picture.

    Attributes:
        folders: A and B.
        names: what they are called.
        rows: pairs of rows with the same prompt and noise.
        scores: the scores that both have. Pairs are ordered by the first one initially.
    """

    folders: tuple[EvaluationFolder, EvaluationFolder]
    names: tuple[str, str]
    rows: list[tuple[Row, Row]]
    scores: list[str]

    def differences(self, score: str) -> np.ndarray:
        """B − A for every pair, float64 (N,), NaN if one of the two was not scored."""
        return column([b for _, b in self.rows], score) - column([a for a, _ in self.rows], score)

    def totals(self, score: str) -> list[JsonObject]:
        """Means of A, B and their paired difference with its 95 % interval: of all pairs, then per tag.

        Pairs without a score are left out.
        """
        tags: dict[str, list[int]] = {}
        for index, (row, _) in enumerate(self.rows):
            tags.setdefault(row.prompt.tag, []).append(index)
        groups = [("all", list(range(len(self.rows))))]
        groups += sorted(tags.items()) if len(tags) > 1 else []
        return [{"tag": tag, **self._total(score, members)} for tag, members in groups]

    def _total(self, score: str, members: Sequence[int]) -> JsonObject:
        pairs = [self.rows[index] for index in members]
        difference = self.differences(score)[members]
        known = np.isfinite(difference)
        found = Mean.of(difference, [row.prompt for row, _ in pairs])
        a, b = (column([pair[side] for pair in pairs], score)[known] for side in (0, 1))
        return {
            "count": found.images,
            "prompts": found.prompts,
            "a": float(a.mean()) if known.any() else None,
            "b": float(b.mean()) if known.any() else None,
            "difference": found.mean,
            "low": found.ci95[0],
            "high": found.ci95[1],
            "better": int((difference[known] > 0).sum()),
            "same": int((difference[known] == 0).sum()),
            "worse": int((difference[known] < 0).sum()),
        }


def read_comparison(a: Path, b: Path) -> Comparison:
    """Two evaluation folders. Raises UserError if they are not of the same prompts and noise."""
    folders = EvaluationFolder(a), EvaluationFolder(b)
    made_with = [folder.made_with() for folder in folders]
    rows = [folder.rows() for folder in folders]
    for folder, found in zip(folders, rows, strict=True):
        if not found:
            raise UserError(f"{folder.path}: it has no pictures yet")
    where = _where(str(a), str(b))
    require_comparable((str(a), str(b)), made_with)
    sizes = [folder.read_image(found[0]).shape for folder, found in zip(folders, rows, strict=True)]
    if sizes[0] != sizes[1]:
        raise UserError(_other_sizes(str(a), str(b), *(size_in_words(*size[:2]) for size in sizes)))
    pairs = list(zip(*rows, strict=False))
    other = next((pair for pair in pairs if pair[0].prompt.text != pair[1].prompt.text), None)
    if other is not None:
        raise UserError(
            f"{where}: picture {other[0].sample} was drawn for other prompts; evaluate both with the same "
            "--prompts, --images and --images-per-prompt"
        )
    contents = [{key: value for key, value in made.items() if key.startswith(CONTENT)} for made in made_with]
    changed = next((key for key, value in contents[0].items() if contents[1].get(key, value) != value), None)
    if changed is not None:
        raise UserError(f"{where}: they were scored with another {changed}; evaluate one of them again")
    names = [score_names(found, made["rewards"]) for found, made in zip(rows, made_with, strict=True)]
    shared = [name for name in names[0] if name in names[1]]
    if made_with[0]["rewards"] != made_with[1]["rewards"] and SUM in shared:
        shared.remove(SUM)  # sums of different rewards
    if not shared:
        raise UserError(f"{where}: no reward scored both of them")
    return Comparison(folders, _names(a, b), pairs, shared)


def require_comparable(names: Sequence[str], made_with: Sequence[JsonObject]) -> None:
    """Raises UserError if two evaluations, finished or not, have different noise or sizes, or no reward in common.

    Args:
        names: of both, for the error.
        made_with: the settings of both.
    """
    seeds = [made["seed"] for made in made_with]
    if seeds[0] != seeds[1]:
        raise UserError(f"{_where(*names)}: their noise has the seeds {seeds[0]} and {seeds[1]}")
    sizes = [size_in_words(*size_of(made["resolution"])) for made in made_with if made.get("resolution")]
    if len(set(sizes)) > 1:
        raise UserError(_other_sizes(*names, *sizes))
    rewards = [[parse_spec(reward).name for reward in made["rewards"]] for made in made_with]
    if not set(rewards[0]) & set(rewards[1]):
        named = " and ".join(", ".join(some) for some in rewards)
        raise UserError(f"{_where(*names)}: no reward scores both ({named}): give both the same --rewards")


def _where(a: str, b: str) -> str:
    return f"{a} and {b} cannot be set side by side"


def _other_sizes(a: str, b: str, a_size: str, b_size: str) -> str:
    return f"{_where(a, b)}: their images are {a_size}, and {b_size}: evaluate both with the same --resolution"


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The folders' names, with as much of their paths as it takes to tell them apart."""
    parts = a.resolve().parts, b.resolve().parts
    length = next((n for n in range(1, max(map(len, parts)) + 1) if parts[0][-n:] != parts[1][-n:]), 1)
    return "/".join(parts[0][-length:]), "/".join(parts[1][-length:])


def print_totals(comparison: Comparison, console: Console) -> None:
    """The totals of the first score on the console."""
    score = comparison.scores[0]
    title = f"{'weighted sum' if score == SUM else score}: means, and their paired difference with its 95 % interval"
    table = Table("tag", title=title, title_justify="left")
    for name in ("A", "B", "B − A", "prompts", "pairs"):
        table.add_column(name, justify="right")
    all_pairs, *tags = comparison.totals(score)
    for total in [*tags, all_pairs]:
        shown = {
            "score_mean": total["difference"],
            "score_ci95": [total["low"], total["high"]],
            "prompts_count": total["prompts"],
        }
        cells = [number(total[side]) if total[side] is not None else "–" for side in "ab"]
        counts = str(total["prompts"]), str(total["count"])
        style = "bold" if total is all_pairs else None
        table.add_row(escape(total["tag"]), *cells, with_interval(shown, "+"), *counts, style=style)
    console.note(f"A: {comparison.folders[0].path}\nB: {comparison.folders[1].path}")
    console.rich.print(table)


def require_writable(path: Path) -> None:
    """Raises UserError if `path` is a folder or another file, or if its folder does not exist."""
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file in it, such as {path / 'page.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}; make it, or choose another")
    if path.exists() and MARK.encode() not in path.read_bytes()[:2000]:
        raise UserError(f"--output {path} exists and was not written by this command: choose another name")


def write_page(comparison: Comparison, path: Path, most_pairs: int) -> None:
    """Writes the page, in one step.

    Args:
        comparison: the two evaluations.
        path: the file.
        most_pairs: maximum number of pairs. If there are more, those with the lowest and highest differences are shown.
    """
    shown = choose_pairs(comparison, most_pairs)
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{script_hash}}", f"sha256-{digest}").replace("{{script}}", script)
    title = html.escape(f"{comparison.names[0]} and {comparison.names[1]} side by side")
    before, after = page.split("{{data}}")
    staged = path.with_name(f".{path.name}")
    with staged.open("w", encoding="utf-8", newline="\n") as file:
        file.write(before.replace("{{title}}", title))
        _write_data(comparison, shown, file)
        file.write(after)
    staged.replace(path)


def choose_pairs(comparison: Comparison, most: int) -> list[int]:
    """Numbers of the pairs to show, by the difference in the first score: the worst first, unscored ones last.

    If there are more than `most`, every score in turn adds its lowest and its highest, so that the first pages are
    right for any order. Pairs without a difference are then left out.
    """
    differences = [comparison.differences(score) for score in comparison.scores]
    # Equal differences in a score are ordered by the first one, as the page orders them.
    orders = [np.lexsort((differences[0], one)) for one in differences]  # NaN comes last
    if len(comparison.rows) <= most:
        return orders[0].tolist()
    scored = [order[: int(np.isfinite(one).sum())] for order, one in zip(orders, differences, strict=True)]
    ends = ((order[place], order[-1 - place]) for place in range(most) for order in scored if place < len(order))
    chosen = set(itertools.islice(dict.fromkeys(itertools.chain.from_iterable(ends)), most))
    return [index for index in orders[0].tolist() if index in chosen]


def _write_data(comparison: Comparison, shown: Sequence[int], file: TextIO) -> None:
    """The page's JSON, a pair at a time: pictures can be many."""
    head = _as_json(_describe(comparison, shown))
    file.write(f'{head[:-1]}, "pairs": [')
    for place, pair in enumerate(_pairs(comparison, shown)):
        file.write((",\n" if place else "\n") + _as_json(pair))
    file.write("\n]}")


def _as_json(value: object) -> str:
    """JSON that stays inside its script element, whatever a prompt says."""
    return json.dumps(finite(value), allow_nan=False).replace("<", "\\u003c")


def _describe(comparison: Comparison, shown: Sequence[int]) -> JsonObject:
    rows = comparison.rows
    height, width = comparison.folders[0].read_image(rows[0][0]).shape[:2]
    made_with = [folder.made_with() for folder in comparison.folders]
    prompts = len({row.prompt.text for row, _ in rows})
    about = f"{counted(len(rows), 'picture')} of {counted(prompts, 'prompt')} from the same noise "
    about += f"(seed {made_with[0]['seed']}), {size_in_words(height, width)}"
    for letter, made in zip("AB", made_with, strict=True):
        about += f" · {letter}: {describe_model(made)}, {made['num_inference_steps']} steps, "
        about += f"guidance {made['guidance_scale']:g}"
    note = ""
    if len(shown) < len(rows):
        note = f"{len(shown)} of {len(rows)} pairs are shown: those with the lowest and the highest differences in "
        note += "each score. The totals count all."
    return {
        "a": {"name": comparison.names[0]},
        "b": {"name": comparison.names[1]},
        "about": about,
        "note": note,
        "width_px": width,
        "height_px": height,
        "scores": [_score(comparison, name) for name in comparison.scores],
    }


def _score(comparison: Comparison, name: str) -> JsonObject:
    totals = comparison.totals(name)
    places = decimals((totals[0]["high"] - totals[0]["low"]) / 2)
    for total in totals:
        if total["prompts"] < FEWEST_PROMPTS:
            total |= {"low": None, "high": None}
    return {"name": "weighted sum" if name == SUM else name, "places": places, "totals": totals}


def _pairs(comparison: Comparison, shown: Sequence[int]) -> Iterator[JsonObject]:
    def describe(index: int) -> JsonObject:
        row = comparison.rows[index][0]
        sides = {side: one(number, index) for number, side in enumerate("ab")}
        return {"sample": row.sample, "prompt": row.prompt.text, "tag": row.prompt.tag, **sides}

    def one(number: int, index: int) -> JsonObject:
        row = comparison.rows[index][number]
        scores = [float(column([row], name)[0]) for name in comparison.scores]
        return {"image": _image_url(comparison.folders[number], row), "scores": scores}

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(describe, shown)


def _image_url(folder: EvaluationFolder, row: Row) -> str:
    content, kind = folder.image_path(row).read_bytes(), "png"
    image = folder.read_image(row)
    if max(image.shape) > LOSSLESS_PX:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="WEBP", quality=WEBP_QUALITY)
        content, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
