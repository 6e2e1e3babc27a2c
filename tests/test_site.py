"""The documentation as a site: every page and every link of it."""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links between pages and their pictures are there, and nothing is loaded from another host."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} < pages and {"index", "changelog", "launch"} < pages
    start = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="rewards.html"' in start and "tiny-shapes_before_after.png" in start
    assert (tmp_path / "site/benchmarks/results/cpu/tiny-shapes_before_after.png").is_file()
    for address in ("fonts.googleapis", "cdn.", "unpkg"):
        assert address not in start


def test_every_document_is_in_the_navigation() -> None:
    """Then no page can be reached by a link alone."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    sections = yaml.safe_load(text)["nav"]
    named = {
        page
        for section in sections
        for entry in section.values()
        for page in ([entry] if isinstance(entry, str) else entry)
    }
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= named
