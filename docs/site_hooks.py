"""What the documentation's site needs beside the pages in docs/: pages and pictures of the checkout that they link to.

Links between documents are written for the checkout. Here those to other documents lead to their pages, pictures come
along, and links to code keep their text alone: the site has no code.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "examples/launch/README.md": "launch.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Documents outside of docs/ and their pages."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
PICTURES = (".png", ".svg")


def on_files(files: Files, config: Any) -> Files:
    """Adds the other documents, and the pictures that any of them shows."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    sources = {source for _, source in _documents(files)}
    for picture in sorted({target for source in sources for target in _pictures(source)}):
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links as the site has them."""
    source = dict(_documents([page.file]))[page.file.src_uri]
    parts = CODE.split(markdown)  # code is every second part, and stays
    return "".join(
        part if number % 2 else LINK.sub(lambda found: _link(found, source), part) for number, part in enumerate(parts)
    )


def _documents(files: Any) -> list[tuple[str, str]]:
    """Page and path in the checkout of each document."""
    outside = {page: source for source, page in PAGES.items()}
    return [(f.src_uri, outside.get(f.src_uri, f"docs/{f.src_uri}")) for f in files if f.src_uri.endswith(".md")]


def _pictures(source: str) -> list[str]:
    text = (ROOT / source).read_text(encoding="utf-8")
    targets = [posixpath.normpath(posixpath.join(posixpath.dirname(source), found[3])) for found in LINK.finditer(text)]
    return [target for target in targets if target.endswith(PICTURES)]


def _link(found: re.Match[str], source: str) -> str:
    mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if target.endswith(PICTURES):
        return f"{mark}[{text}]({target})"
    page = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
    return f"[{text}]({page}{anchor})" if page else text
