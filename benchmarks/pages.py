"""The parts of `docs/scaling.md` that scripts write, each between two marks."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/scaling.md"


def marks(script: str) -> tuple[str, str]:
    """What stands around the part that `python -m benchmarks.SCRIPT` writes."""
    return f"<!-- made by python -m benchmarks.{script} -->", f"<!-- end of {script} -->"


def replace_part(script: str, text: str) -> None:
    """Puts `text` between the marks of `script`."""
    page, (start, stop) = PAGE.read_text(encoding="utf-8"), marks(script)
    before, after = page.split(start)[0], page.split(stop)[1]
    PAGE.write_text(f"{before}{start}\n\n{text}\n\n{stop}{after}", encoding="utf-8")


def part(script: str) -> str:
    """What is there now."""
    start, stop = marks(script)
    return PAGE.read_text(encoding="utf-8").split(start)[1].split(stop)[0].strip()
