"""An HTML document that needs no network and no server: light or dark, from 390 pixels up."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

# Nothing may be loaded from anywhere: what is missing in the file is missing. Pictures may lie beside it.
POLICY_HEADER = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
PICTURES_BESIDE = " 'self' file:"
TEXT_COLUMNS = ("class", "note")
MOST_IN_A_ROW = 6
"""Tiles."""


def document(
    title: str, body: str, *, pictures: bool = False, reload_s: int | None = None, served: tuple[str, str] | None = None
) -> str:
    """A whole HTML document with the style and the script inside it.

    Args:
        title: of the window.
        body: HTML.
        pictures: whether the page shows files that lie beside it.
        reload_s: seconds after which the page loads itself again; None: it does not.
        served: style and script of a page that speaks with the server that it comes from; None: it needs none.
    """
    static = files("dgpo_fast.pages")
    style, script = (static.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = POLICY_HEADER + (PICTURES_BESIDE if pictures else "")
    if served:
        style, script, policy = style + served[0], script + served[1], f"{policy}; connect-src 'self'"
    reload = f' data-reload="{reload_s}"' if reload_s else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>\n{style}</style></head>\n'
        f'<body{reload}>{body}<div id="tip" role="status" aria-live="polite"></div>'
        f"<script>\n{script}</script></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[str], label: str) -> str:
    """A table in a box that scrolls sideways if the page is too narrow; `rows` are HTML."""
    cells = "".join(f'<th scope="col"{_aligned(cell)}>{escape(cell)}</th>' for cell in head)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _aligned(head: str) -> str:
    return ' class="text"' if head in TEXT_COLUMNS else ""


def row(*cells: str, classes: str = "") -> str:
    """A row of cells that are HTML already."""
    css = f' class="{classes}"' if classes else ""
    return f"<tr{css}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def sections(parts: Iterable[tuple[str, str, str]]) -> str:
    """Sections of a page: of each the name in addresses, the title and HTML. Those without HTML are left out."""
    return "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>' for name, title, body in parts if body
    )


def links(parts: Iterable[tuple[str, str, str]]) -> str:
    """Links to the `sections`."""
    shown = (f'<a href="#{name}">{escape(title)}</a>' for name, title, body in parts if body)
    return f'<nav aria-label="Sections">{"".join(shown)}</nav>'


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Large values with what they are below."""
    shown = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in facts)
    columns = len(facts) if len(facts) <= MOST_IN_A_ROW else 4
    return f'<div class="tiles" style="--columns:{columns}">{"".join(shown)}</div>'


def pairs(values: Mapping[str, object]) -> str:
    """Names and values in two columns."""
    rows = (f"<div><dt>{escape(name)}</dt><dd>{escape(_text(value))}</dd></div>" for name, value in values.items())
    return f"<dl>{''.join(rows)}</dl>"


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
