"""Seconds of an iteration against four baselines, and what each saving of the engine is worth.

    python benchmarks/throughput.py [--only TEXT …] [--minutes 9] [--rounds 3] [--groups P]
    python benchmarks/throughput.py paired [--pairs 8] [--iterations 6]
    python benchmarks/throughput.py tables

The first measures every row whose name contains one of TEXT, in one process: on a GPU at the size of SD3.5-Medium with
random weights, on a CPU on the shipped pipeline. Baselines A, B, C and C′ are those of `baselines.py`; ours is the
`Trainer`. All of them draw the same prompts and noise, and take turns. Before that, their gradients of one batch are
compared with one of higher precision: where they differ by more than rounding, the comparison is void.

On a GPU, what rollouts in float8 change is measured too: pictures and rewards of the same prompts and noise.

The second runs `python -m dgpo_fast.train` as a user does, with the engine's savings and without, in turns.
Each row is written to `benchmarks/results/<cpu or gpu>/throughput.json` as soon as it is measured, and
`throughput.md` and `throughput.png` are made of it. A row that fails keeps the error's text, the next one goes on,
and the exit status is 1.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this folder has a `kernels.py`, which would stand before the library of that name

import torch

from benchmarks import float8
from benchmarks.faster_baselines import BASELINES, LORA_ONLY
from benchmarks.paired import paired
from benchmarks.savings import CHANGES, EQUAL_GROUPS, SAVINGS, names
from benchmarks.systems import (
    OURS,
    Comparison,
    Ours,
    by_phase,
    empty_cache,
    in_words,
    quantiles,
    rotated,
    timed,
    timed_with_memory,
)
from benchmarks.throughput_tables import read_report, with_tables, write_tables
from dgpo_fast.config.command_line import configure, quieten_libraries
from dgpo_fast.engine.choices import memory_gib
from dgpo_fast.errors import UserError
from dgpo_fast.profiling.machine import device_row, versions
from dgpo_fast.profiling.power import PowerMeter
from dgpo_fast.profiling.rates import measure_rates
from dgpo_fast.run.metrics import write_json

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
SMALL_GIB = 100.0
"""On a smaller card there is no room for random text encoders, nor for full fine-tuning beside a baseline."""
GROUPS = 4
GPU_BATCH = 32
"""Images of a rollout's batch and, in whole groups, of a micro-batch on a large card; elsewhere they are a group."""
ROW_S = {"cuda": 45.0, "cpu": 5.0}
"""A row that has less time left than this is not begun."""


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    train: str
    guided: bool
    group_size: int

    @property
    def name(self) -> str:
        trained = {"lora": "LoRA", "full": "full"}[self.train]
        return f"{trained}, {'guided' if self.guided else 'unguided'}, G {self.group_size}"


CASES = [Case(train, guided, size) for train in ("lora", "full") for size in (16, 24) for guided in (True, False)]
FIRST = CASES[0]


class Bench:
    """All rows of one device.

    Args:
        device: "cuda" or "cpu".
        groups: P, groups an iteration.
        rounds: measured iterations of each system, after one that warms up.
        minutes: time for all rows.
        only: texts, of which a row's name must contain one; all rows if there are none.
        path: the results' file; rows that are not measured now stay as they are.
        systems: which of the baselines stand beside ours.
        settings: further settings of every run.
    """

    def __init__(
        self,
        device: str,
        *,
        groups: int,
        rounds: int,
        minutes: float,
        only: Sequence[str],
        path: Path,
        systems: Sequence[str] = tuple(BASELINES),
        settings: Sequence[str] = (),
    ):
        self.device, self.groups, self.rounds, self.only = torch.device(device), groups, rounds, only
        self.systems, self.settings = systems, list(settings)
        self.until = time.monotonic() + 60 * minutes
        self.path, self.report = path, read_report(path)
        self.failed = False
        self.kept: Ours | None = None
        # Before anything is written, which would make the commit a dirty one.
        self.versions = versions(self.device, PowerMeter(self.device).driver)

    def run(self) -> None:
        """Measures and writes all rows that were asked for."""
        for case in CASES:
            self.row("cases", case.name, lambda case=case: self.case(case))
        changes = {**SAVINGS, **CHANGES}
        # Last, since its rewards are others: what the rows before it share can go.
        for name in sorted(names(changes, self.device.type), key=lambda name: name == EQUAL_GROUPS):
            kind = "savings" if name in SAVINGS else "changes"
            self.row(kind, name, lambda name=name: self.compare(name, changes[name]))

        for name, settings in float8.RUNS.items() if self.device.type == "cuda" else ():
            self.row("float8", name, lambda settings=settings: float8.difference(settings))

    def row(self, section: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures one row and writes it; an error is written in its place."""
        label = f"{section}: {name}"
        if self.only and not any(text in label for text in self.only):
            return
        if self.left_s < ROW_S[self.device.type]:
            print(f"{label}: not measured, the time is up", flush=True)
            return
        print(f"{label} …", flush=True)
        started = time.monotonic()
        try:
            row = measure()
            self.failed |= bool(row.get("failed"))
        except Exception as error:  # whatever fails in a row, the next one goes on
            traceback.print_exc()
            row = {"error": in_words(error)}
            self.failed = True
        self.report.setdefault(section, {})[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.report)  # before anything else can fail
        row["machine"] = self.machine
        row["took_s"] = round(time.monotonic() - started, 1)
        row["measured"] = {**self.versions, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write()
        if section == "cases":
            torch._dynamo.reset()
        empty_cache(self.device)

    def write(self) -> None:
        """Writes the results' file and the tables made of it."""
        self.report["machine"] = self.machine
        write_json(self.path, self.report)
        try:
            write_tables(self.path)
        except Exception:  # the numbers are safe, and the tables can be made of them later
            traceback.print_exc()
            self.failed = True

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    @cached_property
    def machine(self) -> dict[str, Any]:
        """The device and its rates, measured at the first row's end."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return asdict(device_row(self.device, dtype, measure_rates(self.device, dtype)))

    @property
    def small(self) -> bool:
        """Whether this is a GPU that has not the memory for everything."""
        return self.device.type == "cuda" and memory_gib(self.device) < SMALL_GIB

    def alone(self, case: Case) -> bool:
        """Whether no baseline fits beside ours."""
        return self.small and case.train == "full"

    def beside(self, case: Case) -> list[str]:
        """The baselines of `case`: fully fine-tuned, there is nothing to merge."""
        return [name for name in self.systems if case.train == "lora" or name != LORA_ONLY]

    def arguments(self, case: Case, text_encoders: bool = False) -> list[str]:
        """The settings of a case, as on a command line. The recipe's resolution, steps and objective stay.

        On a GPU it has `text_encoders` where encoding is timed.
        """
        size = case.group_size
        batch = GPU_BATCH if self.device.type == "cuda" and not self.small else size
        args = ["sd35m-geneval", "--rewards", "benchmarks.rewards:Brightness", "--rollout.group-size", str(size)]
        args += ["--rollout.groups", str(self.groups), "--rollout.batch-size", str(batch)]
        args += ["--policy.micro-batch", str(max(batch // size, 1) * size)]
        args += ["--policy.train", case.train, "--evaluation.images", "2", "--reward-workers", "0"]
        args += [] if case.guided else ["--rollout.guidance-scale", "1"]
        if self.device.type == "cuda":
            args += ["--random-weights", "True", "--random-text-encoders", str(text_encoders)]
            args += ["--ema.offload", "True"] if case.train == "full" else []
            args += ["--policy.micro-batch", "4", "--optimizer.name", "adamw8bit"] if self.alone(case) else []
            return [*args, *self.settings]
        args += ["--model", "tiny", "--prompts", "tiny-shapes", "--rollout.resolution", "32", "--device", "cpu"]
        return [*args, "--rollout.max-sequence-length", "0", "--policy.lora-rank", "16", *self.settings]

    def case(self, case: Case) -> dict[str, Any]:
        """The baselines and ours on the same inputs; ours alone if nothing fits beside it."""
        args = self.arguments(case, text_encoders=case.train == "lora" and not self.small)
        systems = () if self.alone(case) else self.beside(case)
        comparison = Comparison(
            Ours(configure(args), self.device), systems, groups=self.groups, rounds=self.rounds, until=self.until
        )
        row: dict[str, Any] = {"settings": args, "images": self.groups * case.group_size, "note": self.note(case)}
        try:
            row["same_gradient"] = {} if self.alone(case) else comparison.check_gradients()
        except Exception as error:  # the times are still worth having, though they are no comparison
            traceback.print_exc()
            row["same_gradient"] = {"error": in_words(error)}
        row["systems"] = comparison.measure()
        void = bool(row["same_gradient"]) and not row["same_gradient"].get("same")
        row["failed"] = void or any("error" in system for system in row["systems"].values())
        return row

    def note(self, case: Case) -> str:
        """What a row has otherwise than its name says, or than the same row of another card."""
        if self.alone(case):
            return "ours alone: micro-batches of 4, 8-bit AdamW, an average in the CPU's memory"
        full = self.device.type == "cuda" and case.train == "full"
        notes = ["an average in the CPU's memory"] if full else []
        notes += ["batches of a group"] if self.small else []
        return "; ".join([*notes, "encoding left out"] if full or self.small else notes)

    def compare(self, name: str, change: list[str]) -> dict[str, Any]:
        """Ours with and without a change of its settings, in turns."""
        args = self.arguments(FIRST)
        if name == EQUAL_GROUPS:
            self.kept = None
            empty_cache(self.device)
            args += ["--rewards", "benchmarks.rewards:HalfEqual"]
            ours = Ours(configure(args), self.device)
        else:
            ours = self.kept = self.kept or Ours(configure(args), self.device)
        pair = {OURS: ours, "changed": Ours(configure([*args, *change]), self.device)}
        times: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
        peaks: dict[str, float | None] = dict.fromkeys(pair)
        warmup = {name: timed(system.step, self.device)["wall"] for name, system in pair.items()}
        for turn in range(max(self.rounds, 3)):
            for name in rotated(list(pair), turn):
                system = pair[name]
                seconds, beyond_mib = timed_with_memory(system.step, self.device)
                times[name].append(seconds)
                if beyond_mib is not None:  # the other system is in memory too
                    peaks[name] = max(peaks[name] or 0.0, system.own_mib + beyond_mib)
            if self.left_s < 0:
                break
        ratios = [b["iteration"] / a["iteration"] for a, b in zip(*times.values(), strict=True)]
        return {
            "settings": [*args, *change],
            "ratio": quantiles(ratios),
            "rounds": len(ratios),
            "warmup_s": warmup,
            "seconds": {name: by_phase(of) for name, of in times.items()},
            "choices": {name: system.trainer.engine.choices.to_dict() for name, system in pair.items()},
            "peak_memory_mib": peaks,
        }


def options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line's options, and the settings that are every run's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "paired", "tables"])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=GROUPS)
    names = {"type": lambda name: name.replace("'", "′"), "choices": list(BASELINES), "default": list(BASELINES)}
    parser.add_argument("--systems", nargs="+", help="baselines, as A B C C'; default: all", **names)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=None, help="folder; default: benchmarks/results/<cpu or gpu>")
    # Named in the first place alone: elsewhere the value of a setting would be taken for it.
    named = args and (not args[0].startswith("-") or args[0] in ("-h", "--help"))
    return parser.parse_known_args(list(args) if named else ["run", *args])


def main() -> int:
    given, settings = options(sys.argv[1:])
    quieten_libraries()
    folder = given.results or RESULTS / ("gpu" if given.device.startswith("cuda") else "cpu")
    path = folder / "throughput.json"
    if given.what == "tables":
        write_tables(path)
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
        return 0
    bench = Bench(
        given.device,
        groups=given.groups,
        rounds=given.rounds,
        minutes=given.minutes,
        only=given.only,
        path=path,
        systems=given.systems,
        settings=settings,
    )
    if given.what == "paired":
        bench.only = []
        name = bench.machine["name"]
        bench.row("paired", name, lambda: paired(given.pairs, given.iterations, SAVINGS, settings))
    else:
        bench.run()
    return int(bench.failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
