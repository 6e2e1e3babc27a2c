"""`python -m benchmarks.compare`: tunes every system the same way and trains each for the same time."""

from benchmarks.compare.settings import CompareSettings
from dgpo_fast.config.command_line import run_command
from dgpo_fast.config.help import print_settings
from dgpo_fast.config.reading import parse_overrides, resolve
from dgpo_fast.errors import UserError

USAGE = """Compare objectives on the shipped pipeline at equal compute.

  python -m benchmarks.compare                     DGPO and its rivals; two and a half hours on two CPU cores
  python -m benchmarks.compare --seeds 5           two more seeds for a finished comparison
  python -m benchmarks.compare --study paper       the paper's own comparisons
  python -m benchmarks.compare --quick             two minutes, only to check that it works
  python -m benchmarks.compare --long              six hours on a GPU, with more images and seeds
  python -m benchmarks.compare --systems dgpo dpo  only these two

If a comparison was stopped, the same command continues it."""


def compare(args: list[str]) -> int:
    """Compares as the command line says; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_settings(USAGE, CompareSettings())
        return 0
    settings = resolve(CompareSettings(), parse_overrides(args, CompareSettings()), "command line")
    if settings.quick and settings.long:
        raise UserError("command line: --quick and --long exclude one another")

    from benchmarks.compare.comparison import Comparison  # these imports take seconds

    Comparison(settings).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(compare))
