"""`python -m benchmarks.compiled_blocks GPU`: what the compiled parts of SD3.5-Medium launch on a GPU, without one."""

import argparse
import json
from pathlib import Path

from benchmarks.compiled_blocks.gpus import GPUS, find
from dgpo_fast.config.command_line import run_command

RESULTS = Path(__file__).parents[1] / "results/compiled_blocks.json"


def main(args: list[str]) -> int:
    """Counts, writes and prints what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_blocks", description=__doc__)
    parser.add_argument("gpu", help=f"one of {', '.join(GPUS)}")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="some programs, as `single.frozen`, without writing results"
    )
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/{RESULTS.name}, if all are counted")
    parser.add_argument("--table", action="store_true", help="print what was counted before, as Markdown")
    options = parser.parse_args(args)
    gpu = find(options.gpu)
    out = options.out or (None if options.only else RESULTS)

    from benchmarks.compiled_blocks.report import counted_on, read, table  # these imports take seconds

    if options.table:
        print(table(read(RESULTS), options.gpu))
        return 0
    found = counted_on(options.gpu, gpu, options.only)
    if out is not None:
        # Another GPU's counts stay in the file.
        found = {**(read(out) if out.exists() else {}), **found}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found, options.gpu))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
