"""Tables of `throughput.json`, in Markdown: what nobody measured reads "not measured"."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.savings import CHANGES, SAVINGS, names
from benchmarks.throughput_plot import plot, ratios

NOT_MEASURED = "not measured"
SYSTEMS = {
    "A": "A, reference-style",
    "B": "B, eager",
    "C": "C, compiled",
    "C′": "C′, compiled, merged copies",
    "ours": "ours",
}
FULL = {"A": SYSTEMS["A"], "B": SYSTEMS["B"], "C": "C and C′, compiled: nothing to merge", "ours": "ours"}
"""If all weights are trained, no LoRA is merged."""
CASES = [
    f"{train}, {guided}, G {size}"
    for train in ("LoRA", "full")
    for size in (16, 24)
    for guided in ("guided", "unguided")
]
HEADLINE = CASES[0]
FP8 = "engine.rollout_precision fp8"
Report = Mapping[str, Any]


def read_report(path: Path) -> dict[str, Any]:
    """The results at `path`; none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def of_its_machine(report: Report) -> Report:
    """`report` without the rows of other machines than the one whose rates it has: they do not compare.

    Rows that name no machine are of that one.
    """
    machine = report.get("machine") or {}

    def here(row: Mapping[str, Any]) -> bool:
        return (row.get("machine") or machine).get("name") == machine.get("name")

    sections = {name: rows for name, rows in report.items() if name != "machine"}
    # Paired rows are ratios, each of a machine of its own.
    kept = {
        name: {key: row for key, row in rows.items() if name == "paired" or here(row)}
        for name, rows in sections.items()
    }
    return {**kept, "machine": report.get("machine")}


def write_tables(path: Path) -> None:
    """Writes `throughput.md` beside the results at `path`, and `throughput.png` if a case was measured."""
    report = of_its_machine(read_report(path))
    path.with_suffix(".md").write_text(document(report), encoding="utf-8")
    cases = {name: row for name, row in _rows(report, "cases", CASES) if row}
    if ratios(cases):
        plot(cases, path.with_suffix(".png"))


def document(report: Report) -> str:
    """All tables."""
    machine = report.get("machine")
    about = "Nothing was measured yet." if machine is None else machine_line(machine)
    parts = [
        "# Throughput",
        "Made by `python benchmarks/throughput.py`; medians, with the 20 and 80 % quantiles in brackets. "
        "Seconds on a CPU are those that the process had of it.",
        about,
        "## One iteration",
        cases_table(report),
        "### Gradients of the same batch",
        gradients_table(report),
        "## What each saving is worth",
        savings_table(report),
        "## What rollouts in float8 change, with 95 % intervals",
        float8_table(report),
        "## The default run",
        paired_table(report),
        "## Targets (one H200)",
        targets_table(report),
    ]
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The device and its rates; of a GPU's products both the lasting and the burst's."""
    burst = f" (in a burst {machine['matmul_burst_tflops']:.3g})" if machine["kind"] == "cuda" else ""
    return (
        f"{machine['name']}, {machine['dtype']}; a matmul of {machine['matmul_size']}² reached "
        f"{machine['matmul_tflops']:.3g} TFLOP/s{burst}, a copy {machine['copy_gb_per_s']:.3g} GB/s."
    )


def cases_table(report: Report) -> str:
    """A row for each case and system."""
    columns = [
        "case",
        "system",
        "iteration, s",
        "rollout, s",
        "train, s",
        "decode, ms an image",
        "images/s",
        "TFLOP/s",
        "of the matmul rate",
        "of the datasheet",
        "memory, GiB",
        "warm-up, s",
        "over ours",
    ]
    rows, machine = [], report.get("machine") or {}
    for case, row in _rows(report, "cases", CASES):
        systems, note = row.get("systems", {}), row.get("note")
        titles = FULL if case.startswith("full") else SYSTEMS
        case = f"{case} ({note})" if note else case
        if not systems:
            rows.append([case, row.get("error", NOT_MEASURED), *[""] * (len(columns) - 2)])
            continue
        ours = systems.get("ours", {}).get("seconds", {}).get("iteration")
        whole = max(system.get("micro_batch", 0) for system in systems.values())
        for name, title in titles.items():
            system = systems.get(name, {})
            if system.get("micro_batch", whole) < whole:
                title += f", micro-batches of {system['micro_batch']}"
            if "seconds" not in system:
                rows.append([case, title, system.get("error", NOT_MEASURED), *[""] * (len(columns) - 3)])
                continue
            seconds = system["seconds"]
            peak = system.get("peak_memory_mib")
            warmup_s = system["warmup_s"] + system.get("first_gradient_s", 0.0)
            rows.append(
                [
                    case,
                    title,
                    _spread(seconds["iteration"]),
                    _spread(seconds["rollout"]),
                    _spread(seconds["train"]),
                    _spread(system.get("decode_ms")),
                    f"{system['images_per_s']:.3g}",
                    f"{system['tflops']:.3g}",
                    _share(system["tflops"], machine.get("matmul_tflops") if machine.get("kind") == "cuda" else None),
                    _share(system["tflops"], machine.get("datasheet_tflops")),
                    NOT_MEASURED if peak is None else f"{peak / 1024:.1f}",
                    f"{warmup_s:.3g}",
                    f"{seconds['iteration'][1] / ours[1]:.2f}×" if ours else "",
                ]
            )
    return _table(columns, rows)


def gradients_table(report: Report) -> str:
    """How far each system's gradient is from one of higher precision, and from ours."""
    columns = ["case", *SYSTEMS, "allowed (twice B's)", "largest difference from ours", "verdict"]
    rows = []
    for case, row in _rows(report, "cases", [HEADLINE]):
        found = row.get("same_gradient") or {}
        errors, apart = found.get("relative_error", {}), found.get("largest_difference_from_ours", {})
        verdict = "the same" if found.get("same") else found.get("error", "NOT THE SAME: void")
        verdict = verdict if found else NOT_MEASURED
        verdict += f", without {', '.join(found['missing'])}" if found.get("missing") else ""
        rows.append(
            [
                case,
                *(
                    "as C" if case.startswith("full") and name not in FULL else _scientific(errors.get(name))
                    for name in SYSTEMS
                ),
                _scientific(found.get("budget")),
                _scientific(max(apart.values()) if apart else None),
                verdict,
            ]
        )
    return _table(columns, rows)


def savings_table(report: Report) -> str:
    """How much longer an iteration takes with each saving alone switched off, or with something else switched on."""
    rows, device = [], (report.get("machine") or {}).get("kind", "cuda")
    for section, settings, word in (("savings", SAVINGS, "off"), ("changes", CHANGES, "")):
        for name, row in _rows(report, section, names(settings, device)):
            label = f"`{name}` {word}".strip() if "." in name else f"{name} {word}".strip()
            if "ratio" not in row:
                rows.append([label, row.get("error", NOT_MEASURED), "", "", ""])
                continue
            with_it, without = (row["seconds"][of]["iteration"] for of in ("ours", "changed"))
            rows.append([label, _spread(with_it), _spread(without), f"{_spread(row['ratio'])}×", str(row["rounds"])])
    return _table(["setting", "as it is, s", "changed, s", "changed over as it is", "pairs"], rows)


def float8_table(report: Report) -> str:
    """How far pictures and rewards of rollouts in float8 are from those without, by the same prompts and noise."""
    rows = []
    for name, row in _rows(report, "float8", ["tiny-shapes"]):
        if "pictures" not in row:
            rows.append([name, row.get("error", NOT_MEASURED), "", "", ""])
            continue
        rewards = [_interval(row[key]) if key in row else "mean nothing" for key in ("reward", "reward_difference")]
        rows.append([name, _interval(row["pictures"]), *rewards, str(row["images"])])
    columns = [
        "run, before training",
        "pictures apart, of 255",
        "reward without",
        "reward in float8 minus that",
        "images",
    ]
    return _table(columns, rows)


def paired_table(report: Report) -> str:
    """The default run with the savings over without, by machine."""
    rows = []
    for machine, row in report.get("paired", {}).items():
        if "ratio" not in row:
            rows.append([machine, row.get("error", NOT_MEASURED), *[""] * 5])
            continue
        rate = f"{row['machine']['matmul_tflops']:.3g}"
        for key, title in (("iteration_s", "seconds"), ("iteration_cpu_s", "CPU seconds of the process")):
            off, on = (sorted(run[key] for run in row["runs"][name]) for name in ("off", "on"))
            found = row["ratio"][key]
            low, high = found["interval"]
            times = f"{found['median']:.2f}× ({low:.2f} to {high:.2f})"
            middle = f"{off[len(off) // 2]:.2f}", f"{on[len(on) // 2]:.2f}"
            rows.append([machine, rate, title, *middle, times, str(row["pairs"])])
    columns = [
        "machine",
        "its matmul, TFLOP/s",
        "of an iteration",
        "savings off",
        "savings on",
        "off over on, 95 % interval",
        "pairs of runs",
    ]
    return _table(columns, rows) if rows else NOT_MEASURED


def targets_table(report: Report) -> str:
    """First and later targets beside what was measured on a GPU at SD3.5-Medium's size."""
    on_gpu = (report.get("machine") or {}).get("kind") == "cuda"
    systems = report.get("cases", {}).get(HEADLINE, {}).get("systems", {}) if on_gpu else {}
    seconds = {name: system["seconds"]["iteration"][1] for name, system in systems.items() if "seconds" in system}
    parts = {
        name: {part: system[part][1] for part in ("forward_ms", "decode_ms") if part in system}
        for name, system in systems.items()
    }

    def over(name: str, part: str | None = None) -> float | None:
        of = seconds if part is None else {system: found.get(part) for system, found in parts.items()}
        theirs, ours = of.get(name), of.get("ours")
        return theirs / ours if theirs and ours else None

    decode = parts.get("ours", {}).get("decode_ms")
    matmul = (report.get("machine") or {}).get("matmul_tflops")
    mfu = 100 * systems["ours"]["tflops"] / matmul if "ours" in seconds else None
    fp8 = report.get("changes", {}).get(FP8, {}).get("ratio") if on_gpu else None
    with_fp8 = over("A")
    rows = [
        _target("transformer forward vs B", over("B", "forward_ms"), 1.4, 1.6, "×"),
        _target("decode of a 512² image, ms, at most", decode, 12, 7.5, "", smaller=True),
        _target("iteration vs A, same gradient", over("A"), 2.2, 2.6, "×"),
        _target("iteration vs B, same gradient", over("B"), 1.6, 1.9, "×"),
        _target("iteration vs C, same gradient", over("C"), 1.1, 1.3, "×"),
        _target("iteration vs C′, same gradient", over("C′"), 1.0, 1.2, "×"),
        _target("useful FLOP/s of the sustained matmul rate in the run", mfu, 60, 72, " %"),
        _target("with fp8 rollout, inexact, vs A", with_fp8 / fp8[1] if with_fp8 and fp8 else None, 2.7, 3.3, "×"),
    ]
    return _table(["", "first", "then", "measured", "reached"], rows)


def _target(
    title: str, measured: float | None, first: float, later: float, unit: str, smaller: bool = False
) -> list[str]:
    if measured is None:
        return [title, f"{first:g}{unit}", f"{later:g}{unit}", NOT_MEASURED, NOT_MEASURED]
    reached = [measured <= goal if smaller else measured >= goal for goal in (first, later)]
    said = "both" if reached[1] else "the first" if reached[0] else "no"
    return [title, f"{first:g}{unit}", f"{later:g}{unit}", f"{measured:.3g}{unit}", said]


def _rows(report: Report, section: str, expected: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """What was measured, in the order of `expected`, and what of that was not."""
    found = report.get(section, {})
    missing = [name for name in expected if name not in found]
    return sorted(
        [*found.items(), *((name, {}) for name in missing)],
        key=lambda row: expected.index(row[0]) if row[0] in expected else len(expected),
    )


def _spread(quantiles: Sequence[float] | None) -> str:
    if not quantiles:
        return NOT_MEASURED
    low, middle, high = quantiles
    return f"{middle:.3g} ({low:.3g}, {high:.3g})"


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:.3g} ({low:.3g} to {high:.3g})"


def _share(value: float, whole: float | None) -> str:
    return f"{100 * value / whole:.0f} %" if whole else ""


def _scientific(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1e}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {
    "cases": cases_table,
    "gradients": gradients_table,
    "savings": savings_table,
    "paired": paired_table,
    "targets": targets_table,
    "float8": float8_table,
}


def with_tables(text: str, results: Path) -> str:
    """A document with its tables between `<!-- throughput DEVICE TABLE -->` and `<!-- end -->` made anew."""

    def table(found: re.Match[str]) -> str:
        device, name = found[1], found[2]
        made = TABLES[name](of_its_machine(read_report(results / device / "throughput.json")))
        return f"<!-- throughput {device} {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- throughput (\w+) (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)
