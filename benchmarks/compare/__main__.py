"""`python -m benchmarks.compare`: tunes every system alike, trains it for the same time, and says what came of it."""

from benchmarks.compare.settings import CompareSettings
from dgpo_fast.config.command_line import print_settings, run_command
from dgpo_fast.config.reading import parse_overrides, resolve
from dgpo_fast.errors import UserError

USAGE = """Compare DGPO, Diffusion-DPO and Flow-GRPO on the shipped pipeline, online and offline, and DGPO's ablations.

  python -m benchmarks.compare                     under two hours on two CPU cores
  python -m benchmarks.compare --quick             two minutes, to see that it works
  python -m benchmarks.compare --long              larger and longer, for a GPU
  python -m benchmarks.compare --systems dgpo dpo  only these

The same command goes on where it was stopped."""


def compare(args: list[str]) -> int:
    """Compares as the command line says; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_settings("benchmarks.compare", USAGE, CompareSettings())
        return 0
    settings = resolve(CompareSettings(), parse_overrides(args, CompareSettings()), "command line")
    if settings.quick and settings.long:
        raise UserError("command line: --quick and --long exclude one another")

    from benchmarks.compare.comparison import Comparison  # these imports take seconds

    Comparison(settings).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(compare))
