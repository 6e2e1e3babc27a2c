"""Two evaluations as one page: its numbers, its order, and that nothing in a prompt is ever more than text."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.evaluate import evaluate
from dgpo_fast.evaluation.folder import EvaluationFolder, Row
from dgpo_fast.evaluation.side_by_side import choose_pairs, read_comparison, write_page
from dgpo_fast.prompts import Prompt

MADE_WITH = {
    "model": "tiny", "lora": None, "weights": None, "rewards": ["shapes"], "seed": 0, "num_inference_steps": 8,
    "guidance_scale": 1.0,
}  # fmt: skip
HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!-- <script> \u2028 \\u003c {{data}} {{title}}",
    "\u202egnp.exe & \"quotes\" 'apostrophes' \U0001f600",
]


def save(folder: Path, prompts: list[Prompt], scores: list[float], size: int = 8, **changes: object) -> Path:
    """An evaluation of these prompts and scores, with random pictures."""
    evaluation = EvaluationFolder(folder)
    evaluation.begin({**MADE_WITH, "images_count": len(prompts), **changes}).release()
    rng = np.random.default_rng(len(str(folder)))
    rows = [
        Row(n, prompt, score, {"shapes": score, "shapes/correct": float(score > 0.5)})
        for n, (prompt, score) in enumerate(zip(prompts, scores, strict=True))
    ]
    for row in rows:
        evaluation.write_image(row.sample, rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    evaluation.append(rows)
    return folder


def numbered(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {n}", {"tag": f"tag {n % 2}"}) for n in range(count)]


class Page(HTMLParser):
    """The page as a browser's parser sees it: its elements, and the text of each script."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def test_paired_difference_by_hand(tmp_path: Path) -> None:
    """B − A of each pair, its mean, and ± t·s/√n of the differences; a pair without one score counts nowhere."""
    a, b = [0.5, 0.25, 1.0, 0.0, 0.5, float("nan")], [0.5, 0.75, 0.5, 0.25, 0.75, 1.0]
    comparison = read_comparison(save(tmp_path / "a", numbered(6), a), save(tmp_path / "b", numbered(6), b))
    whole, first, second = comparison.totals("shapes")
    difference = np.array([0.0, 0.5, -0.5, 0.25, 0.25])
    half = 2.776445 * difference.std(ddof=1) / np.sqrt(5)
    assert (whole["difference"], whole["low"], whole["high"]) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    assert (whole["a"], whole["b"]) == pytest.approx((0.45, 0.55))
    assert [whole[key] for key in ("count", "better", "same", "worse")] == [5, 3, 1, 1]
    assert first["tag"] == "tag 0" and first["difference"] == pytest.approx((0.0 - 0.5 + 0.25) / 3)
    assert second["tag"] == "tag 1" and second["difference"] == pytest.approx((0.5 + 0.25) / 2)


def test_the_page_holds_what_the_evaluations_hold(tmp_path: Path) -> None:
    """Prompts, tags, scores and the very pictures; and nothing that a browser would fetch."""
    a = save(tmp_path / "a", numbered(4), [0.0, 1.0, float("nan"), 0.5])
    b = save(tmp_path / "b", numbered(4), [0.5, 0.0, 1.0, 0.5])
    assert evaluate(["--side-by-side", str(a), str(b), "--output", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    pairs = page.data["pairs"]
    assert [(pair["sample"], pair["prompt"], pair["tag"]) for pair in pairs] == [
        (n, f"prompt {n}", f"tag {n % 2}") for n in range(4)
    ]
    assert [pair["a"]["scores"] for pair in pairs] == [[0.0, 0.0], [1.0, 1.0], [None, 0.0], [0.5, 0.0]]
    assert [pair["b"]["scores"][0] for pair in pairs] == [0.5, 0.0, 1.0, 0.5]
    picture = (a / "images/000001.png").read_bytes()
    assert pairs[1]["a"]["image"] == "data:image/png;base64," + base64.b64encode(picture).decode()
    assert [score["name"] for score in page.data["scores"]] == ["shapes", "shapes/correct"]
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "action") if key in attrs]
    assert links == ["data:,"]
    assert "://" not in (tmp_path / "page.html").read_text().replace("http://www.w3.org/2000/svg", "")


def test_hostile_prompts_are_text(tmp_path: Path) -> None:
    """Prompts add no element to the page, whatever they say, and arrive unchanged."""
    prompts = [Prompt(text, {"tag": "<b>tag</b>"}) for text in HOSTILE]
    pages = []
    for name, texts in (("plain", numbered(4)), ("hostile", prompts)):
        a, b = (save(tmp_path / f"{name}{letter}", texts, [0.5] * 4) for letter in "ab")
        write_page(read_comparison(a, b), tmp_path / f"{name}.html", 400)
        pages.append(Page(tmp_path / f"{name}.html"))
    assert pages[1].tags == pages[0].tags and pages[1].scripts[1] == pages[0].scripts[1]
    assert [pair["prompt"] for pair in pages[1].data["pairs"]] == HOSTILE


def test_many_pairs_leave_the_worst_and_the_best(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(30)
    b[7] = np.nan
    comparison = read_comparison(*(save(tmp_path / name, numbered(30), list(s)) for name, s in (("a", a), ("b", b))))
    order = np.argsort(np.where(np.isnan(b - a), np.inf, b - a))[:29]
    assert choose_pairs(comparison, 9) == sorted([*order[:5], *order[-4:]])
    assert choose_pairs(comparison, 30) == list(range(30)), "unscored pairs too, where there is room"
    write_page(comparison, tmp_path / "page.html", 9)
    data = Page(tmp_path / "page.html").data
    assert len(data["pairs"]) == 9 and data["note"].startswith("9 of 30 pairs are shown")
    assert data["scores"][0]["totals"][0]["count"] == 29, "totals count all"


def test_large_pictures_become_webp(tmp_path: Path) -> None:
    a, b = (save(tmp_path / name, numbered(2), [0.0, 1.0], size=96) for name in "ab")
    write_page(read_comparison(a, b), tmp_path / "page.html", 400)
    assert Page(tmp_path / "page.html").data["pairs"][0]["a"]["image"].startswith("data:image/webp;base64,UklGR")


def test_what_cannot_be_set_side_by_side(tmp_path: Path) -> None:
    """Other noise, other prompts, other sizes, no shared reward, a file that is no page: one line each."""
    a = save(tmp_path / "a", numbered(4), [0.5] * 4)
    others = {
        "their noise has the seeds 0 and 1": save(tmp_path / "b", numbered(4), [0.5] * 4, seed=1),
        "picture 1 was drawn for other prompts": save(tmp_path / "c", numbered(4)[:1] * 2, [0.5] * 2),
        "their pictures are 8 and 16 pixels wide": save(tmp_path / "d", numbered(4), [0.5] * 4, size=16),
        "no picture is there yet": save(tmp_path / "e", [], []),
    }
    for line, other in others.items():
        with pytest.raises(UserError, match=line):
            evaluate(["--side-by-side", str(a), str(other)])
    (tmp_path / "letter.html").write_text("<p>dear</p>")
    with pytest.raises(UserError, match="exists and is no page of this command: choose another name"):
        evaluate(["--side-by-side", str(a), str(a), "--output", str(tmp_path / "letter.html")])
    assert (tmp_path / "letter.html").read_text() == "<p>dear</p>"
    shorter = save(tmp_path / "f", numbered(2), [0.5] * 2)
    assert len(read_comparison(a, shorter).rows) == 2, "what both have is compared"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_in_a_browser(tmp_path: Path) -> None:
    """The worst pair comes first, hostile prompts show as text, and the console stays silent."""
    prompts = [Prompt(text, {"tag": f"<i>{n}</i>"}) for n, text in enumerate(HOSTILE)]
    a = save(tmp_path / "<b>a", prompts, [0.75, 0.5, 1.0, 0.5])
    b = save(tmp_path / "b", prompts, [0.25, 0.75, 0.0, 0.5])
    write_page(read_comparison(a, b), tmp_path / "page.html", 400)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    body = done.stdout.split('<script type="application/json"')[0]
    assert "owned" not in re.findall("<title>(.*?)</title>", body)[0]
    (prompt,) = re.findall('<p class="prompt"[^>]*>(.*?)</p>', body)
    assert prompt == "&lt;!-- &lt;script&gt; \u2028 \\u003c {{data}} {{title}}"
    assert "1 of 4" in body and "▼ −1.00" in body and "A · &lt;b&gt;a<" in body
    assert re.search(r'id="total"[^>]*>−0\.31<', body)
