"""The parts of the documents that scripts write, each between two marks."""

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SCALING, PERFORMANCE = DOCS / "scaling.md", DOCS / "performance.md"


def marks(script: str) -> tuple[str, str]:
    """What stands around the part that `python -m benchmarks.SCRIPT` writes."""
    return f"<!-- made by python -m benchmarks.{script} -->", f"<!-- end of {script} -->"


def replace_part(script: str, text: str, path: Path = SCALING) -> None:
    """Puts `text` between the marks of `script` on the page at `path`."""
    page, (start, stop) = path.read_text(encoding="utf-8"), marks(script)
    before, after = page.split(start)[0], page.split(stop)[1]
    path.write_text(f"{before}{start}\n\n{text}\n\n{stop}{after}", encoding="utf-8")


def part(script: str, path: Path = SCALING) -> str:
    """What is there now."""
    start, stop = marks(script)
    return path.read_text(encoding="utf-8").split(start)[1].split(stop)[0].strip()
