"""The page to vote on: HTML without what the server tells it later."""

from html import escape
from importlib.resources import files
from pathlib import Path

from dgpo_fast.pages.document import document

UNDO = '<button type="button" class="undo" disabled>Undo</button>'
ASKS = {"best": "Best", "rank": "Rank", "rate": "Rate"}


def vote_page(folder: Path) -> str:
    """The whole page, for the votes in `folder`."""
    asks = "".join(
        f'<label><input type="radio" name="ask" value="{value}"><span>{name}</span></label>'
        for value, name in ASKS.items()
    )
    body = f"""<header><div class="top"><h1>Vote</h1><p id="progress" class="soft small" role="status"></p></div>
<progress id="bar" value="0" aria-label="Groups voted on"></progress></header>
<main>
<section id="problem" class="worse" role="alert" hidden></section>
<section id="group" aria-label="Group" hidden>
<fieldset aria-label="What to say">{asks}</fieldset>
<p id="task" class="soft small"></p>
<h2 id="prompt" dir="auto" aria-live="polite"></h2>
<div id="pictures"></div>
<div class="actions">{UNDO}<button type="button" id="skip">Skip</button>
<button type="button" id="next" class="main">Next</button></div>
<p class="keys soft small" id="keys"></p>
</section>
<section id="wait" hidden><p>The next group is being drawn.</p>{UNDO}</section>
<section id="done" hidden><h2>All groups are voted on.</h2>
<p>Press Ctrl-C where the command runs. A LoRA is trained on the votes with:</p>
<p><code class="command" id="train"></code></p>{UNDO}</section>
</main>
<footer>Every vote is kept at once, in <code>{escape(str(folder))}</code>.</footer>
<dialog id="large"><button type="button" id="close" aria-label="Close">
<img id="large-image" alt=""></button></dialog>"""
    static = files("dgpo_fast.voting")
    style, script = (static.joinpath(name).read_text(encoding="utf-8") for name in ("vote.css", "vote.js"))
    return document(f"Vote · {folder.name}", body, pictures=True, served=(style, script))
