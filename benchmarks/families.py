"""Every family of models through all its tests, whole runs included: what holds for which, on one page.

    python -m benchmarks.families [FAMILY …] [--workers 2]

Runs `tests/families` with `DGPO_FAST_EVERY_FAMILY=1`: small pipelines with random weights are compared with diffusers'
own, trained with LoRA and in full, resumed and evaluated, and what they save is drawn by plain diffusers. Without a
family, all of them; about a quarter of an hour on two cores. Writes `families.json`, and the table in docs/families.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import DOCS, replace_part
from dgpo_fast.profiling.machine import commit, cpu_name, versions
from dgpo_fast.run.metrics import write_json
from tests.families.test_pictures import CASES

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/cpu/families.json"
COLUMNS = {
    "latents, pixels": "test_latents_and_pixels_are_those_of_diffusers_pipeline",
    "batches": "test_prompts_of_different_lengths_in_one_batch_equal_one_by_one",
    "seen by the tests": "test_prompt_guidance_time_and_place_change_the_picture",
    "gradient": "test_gradients",
    "run with LoRA": "test_end_to_end.*-lora]",
    "run in full": "test_end_to_end.*-full]",
    "simulated memory": "test_memory",
    "predicted memory": "test_predicted_memory_is_measured",
    "blocks, attention": "test_blocks",
}
"""Titles, and what the tests' names hold."""


def run_tests(names: list[str], workers: int) -> dict[str, dict[str, str]]:
    """What became of every test, by the family's name and the test's: passed, failed or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/families", "-n", str(workers), "-q", f"--junitxml={report}"]
        subprocess.run([*command, "-k", " or ".join(names)], cwd=ROOT, env=os.environ | {"DGPO_FAST_EVERY_FAMILY": "1"})
        found: dict[str, dict[str, str]] = {name: {} for name in names}
        for case in ET.parse(report).iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            identity = "".join(re.findall(r"\[(.*)\]", test))
            owners = [name for name in names if re.search(rf"(^|-){re.escape(name)}(-|$)", identity)]
            # One name may begin another: chroma, chroma-masked.
            owner = max(owners, key=len, default=None)
            if owner is not None:
                ends = {"failure": "failed", "error": "failed", "skipped": "skipped"}
                found[owner][test] = next((ends[child.tag] for child in case if child.tag in ends), "passed")
    return found


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown: passed of all tests of a kind."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, tests in report["families"].items():
        cells = []
        for pattern in COLUMNS.values():
            results = [end for test, end in tests.items() if re.search(pattern, test) and end != "skipped"]
            cells.append(f"{results.count('passed')} of {len(results)}" if results else "–")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    about = f"{report['machine']}, torch {report['versions']['torch']}, commit {report['commit']}, {report['date']}."
    return "\n".join([*lines, "", f"Tests passed. {about}"])


def main() -> None:
    """Measures, writes, and ends with 1 if a test failed."""
    known = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(known)}")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    unknown = [name for name in given.families if name not in known]
    if unknown:
        parser.error(f"no family {unknown[0]!r}: name some of {', '.join(known)}")
    earlier = json.loads(RESULT.read_text("utf-8"))["families"] if RESULT.exists() else {}
    report = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": cpu_name(),
        "versions": versions(torch.device("cpu"), None),
        "families": {**earlier, **run_tests(given.families or known, given.workers)},
    }
    write_json(RESULT, report)
    replace_part("families", table(report), DOCS / "families.md")
    sys.exit(any("failed" in tests.values() for tests in report["families"].values()))


if __name__ == "__main__":
    main()
