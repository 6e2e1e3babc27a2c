"""Two evaluations as one page: its numbers, its order, and that nothing in a prompt is ever more than text."""

import base64
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.folder import EvaluationFolder, Row
from dgpo_fast.evaluation.side_by_side import choose_pairs, read_comparison, write_page
from dgpo_fast.prompts import Prompt
from tests.browser import Browser, needs_chromium

MADE_WITH = {
    "model": "tiny",
    "lora": None,
    "weights": None,
    "rewards": ["shapes"],
    "seed": 0,
    "num_inference_steps": 8,
    "guidance_scale": 1.0,
}
HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!-- <script> \u2028 \\u003c {{data}} {{title}}",
    "\u202egnp.exe & \"quotes\" 'apostrophes' \U0001f600",
]


def save(
    folder: Path,
    prompts: list[Prompt],
    scores: list[float],
    size: int = 8,
    parts: dict[str, list[float]] | None = None,
    **changes: object,
) -> Path:
    """An evaluation of these prompts, scores of `shapes` and its parts (by default "correct"), with random pictures."""
    parts = parts or {"correct": [float(score > 0.5) for score in scores]}
    evaluation = EvaluationFolder(folder)
    evaluation.begin({**MADE_WITH, "images_count": len(prompts), **changes}).release()
    rng = np.random.default_rng(len(str(folder)))
    rows = [
        Row(n, prompt, score, {"shapes": score, **{f"shapes/{part}": values[n] for part, values in parts.items()}})
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
    assert [whole[key] for key in ("count", "prompts", "better", "same", "worse")] == [5, 5, 3, 1, 1]
    assert first["tag"] == "tag 0" and first["difference"] == pytest.approx((0.0 - 0.5 + 0.25) / 3)
    assert second["tag"] == "tag 1" and second["difference"] == pytest.approx((0.5 + 0.25) / 2)


def test_the_page_holds_what_the_evaluations_hold(tmp_path: Path) -> None:
    """Prompts, tags, scores and the very pictures, the worst pair first and the unscored one last; and nothing that a
    browser would fetch."""
    a = save(tmp_path / "a", numbered(5), [0.0, 1.0, float("nan"), 0.5, 0.75])
    b = save(tmp_path / "b", numbered(5), [0.5, 0.0, 1.0, 0.5, 0.75])
    assert evaluate(["--side-by-side", str(a), str(b), "--output", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    pairs = page.data["pairs"]
    assert [(pair["sample"], pair["prompt"], pair["tag"]) for pair in pairs] == [
        (n, f"prompt {n}", f"tag {n % 2}") for n in (1, 3, 4, 0, 2)
    ]
    assert [pair["a"]["scores"] for pair in pairs] == [[1.0, 1.0], [0.5, 0.0], [0.75, 1.0], [0.0, 0.0], [None, 0.0]]
    assert [pair["b"]["scores"][0] for pair in pairs] == [0.0, 0.5, 0.75, 0.5, 1.0]
    assert pairs[0]["a"]["image"] == image_url(a, 1)
    assert [score["name"] for score in page.data["scores"]] == ["shapes", "shapes/correct"]
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "href", "action") if key in attrs]
    assert links == ["data:,"]
    assert "://" not in (tmp_path / "page.html").read_text().replace("http://www.w3.org/2000/svg", "")


def test_no_interval_is_shown_of_fewer_than_five_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the table nor on the page, however many pictures there are of them."""
    for prompts, shown in ((4, False), (5, True)):
        folders = [
            save(
                tmp_path / f"{name}{prompts}",
                [Prompt(f"prompt {n % prompts}") for n in range(10)],
                [value + 0.01 * n for n in range(10)],
            )
            for name, value in (("a", 0.1), ("b", 0.3))
        ]
        page = tmp_path / f"{prompts}.html"
        assert evaluate(["--side-by-side", *map(str, folders), "--output", str(page)]) == 0
        assert isinstance(Page(page).data["scores"][0]["totals"][0]["low"], float) == shown
        (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ all "))
        assert ("±" in row) == shown and row.split("│")[-3].strip() == str(prompts)


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


def test_many_pairs_leave_the_worst_and_the_best_of_every_score(tmp_path: Path) -> None:
    """By either score, the page begins and ends with the pairs that all pairs together would begin and end with."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 40)), rng.random((2, 40))
    b[0, 7] = b[1, 8] = np.nan
    folders = [
        save(tmp_path / name, numbered(40), [*one], parts={"hue": [*hue]})
        for name, (one, hue) in zip("ab", (a, b), strict=True)
    ]
    comparison = read_comparison(*folders)
    assert comparison.scores == ["shapes", "shapes/hue"]
    whole, hue = (np.argsort(one)[:39].tolist() for one in b - a)  # NaN comes last
    shown = choose_pairs(comparison, 12)
    assert len(shown) == 12 and shown == [index for index in whole if index in shown], "the worst first"
    by_hue = [index for index in hue if index in shown]
    for ordered, found in ((whole, shown), (hue, by_hue)):
        assert ordered[:3] == found[:3] and ordered[-3:] == found[-3:]
    assert choose_pairs(comparison, 40) == [*whole, 7], "unscored pairs too, where there is room"
    write_page(comparison, tmp_path / "page.html", 12)
    data = Page(tmp_path / "page.html").data
    assert [pair["sample"] for pair in data["pairs"]] == shown
    assert data["note"].startswith(
        "12 of 40 pairs are shown: those with the lowest and the highest differences in each"
    )
    assert data["scores"][0]["totals"][0]["count"] == 39, "totals count all"


def test_equal_differences_of_another_score_are_ordered_by_the_first(tmp_path: Path) -> None:
    """Of many pairs that are equally wrong by a part that is 0 or 1, the worst ones by the score are shown."""
    b = [0.1 * n for n in (3, 1, 4, 0, 5, 2)]
    folders = [
        save(tmp_path / "a", numbered(6), [1.0] * 6, parts={"correct": [1.0] * 6}),
        save(tmp_path / "b", numbered(6), b, parts={"correct": [0.0] * 4 + [1.0] * 2}),
    ]
    assert choose_pairs(read_comparison(*folders), 3) == [3, 1, 4]


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
        "their images are 8 × 8 pixels, and 16 × 16 pixels: evaluate both with the same --resolution": save(
            tmp_path / "d", numbered(4), [0.5] * 4, size=16
        ),
        "it has no pictures yet": save(tmp_path / "e", [], []),
    }
    for line, other in others.items():
        with pytest.raises(UserError, match=line):
            evaluate(["--side-by-side", str(a), str(other)])
    (tmp_path / "letter.html").write_text("<p>dear</p>")
    with pytest.raises(UserError, match="exists and was not written by this command: choose another name"):
        evaluate(["--side-by-side", str(a), str(a), "--output", str(tmp_path / "letter.html")])
    assert (tmp_path / "letter.html").read_text() == "<p>dear</p>"
    with pytest.raises(UserError, match=r"^--output \S+/none/x\.html: there is no folder \S+/none; make it, or choose"):
        evaluate(["--side-by-side", str(a), str(a), "--output", str(tmp_path / "none/x.html")])
    assert not (tmp_path / "none").exists()
    shorter = save(tmp_path / "f", numbered(2), [0.5] * 2)
    assert len(read_comparison(a, shorter).rows) == 2, "what both have is compared"


def four_pairs(folder: Path) -> Path:
    """A page of four pairs: by shapes, the worst first, 2, 0, 3 and 1; by hue 1, 3, 2 and 0."""
    prompts = [Prompt(text, {"tag": f"<i>{n % 2}</i>"}) for n, text in enumerate(HOSTILE)]
    a = save(folder / "<b>a", prompts, [0.75, 0.5, 1.0, 0.5], parts={"hue": [0.0, 1.0, 0.0, 1.0]})
    b = save(folder / "b", prompts, [0.25, 0.75, 0.0, 0.5], parts={"hue": [0.75, 0.0, 0.25, 0.5]})
    write_page(read_comparison(a, b), folder / "page.html", 400)
    return folder / "page.html"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_orders_filters_and_paging(tmp_path: Path) -> None:
    """What page.js has in its list, and where it is, after each change, click and key."""
    steps: list[tuple[dict, list[int], int]] = [
        ({"key": "Home"}, [2, 0, 3, 1], 0),
        ({"click": "next"}, [2, 0, 3, 1], 1),
        ({"key": "ArrowRight"}, [2, 0, 3, 1], 2),
        ({"click": "previous"}, [2, 0, 3, 1], 1),
        ({"key": "End"}, [2, 0, 3, 1], 3),
        ({"key": "ArrowRight"}, [2, 0, 3, 1], 3),
        ({"click": "next"}, [2, 0, 3, 1], 3),
        ({"key": "ArrowLeft", "shift": True}, [2, 0, 3, 1], 0),
        ({"change": ["order", "best"]}, [1, 3, 0, 2], 0),
        ({"change": ["order", "change"]}, [2, 0, 1, 3], 0),
        ({"change": ["order", "number"]}, [0, 1, 2, 3], 0),
        ({"change": ["score", "1"]}, [0, 1, 2, 3], 0),
        ({"change": ["order", "worst"]}, [1, 3, 2, 0], 0),
        ({"key": "ArrowRight"}, [1, 3, 2, 0], 1),
        ({"change": ["tag", "<i>0</i>"]}, [2, 0], 0),
        ({"change": ["find", " OWNED"]}, [0], 0),
        ({"change": ["tag", ""]}, [1, 0], 0),
        ({"change": ["score", "0"]}, [0, 1], 0),
        ({"change": ["find", "no such words"]}, [], 0),
        ({"key": "ArrowRight"}, [], 0),
        ({"change": ["find", ""]}, [2, 0, 3, 1], 0),
    ]
    script = Path(__file__).with_name("page_in_node.js")
    command = ["node", script, four_pairs(tmp_path), json.dumps([step for step, *_ in steps])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [{"at": at, "list": samples} for _, samples, at in steps]


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser(width: int, height: int, chromium: Browser, tmp_path: Path) -> None:
    """The worst pair comes first; keys, clicks and filters change what is shown; hostile prompts show as text, the
    console stays silent, and nothing is wider than the window."""
    chromium.open(four_pairs(tmp_path), width, height)

    def shown() -> tuple[str, str, str]:
        return tuple(
            chromium.run(f"document.getElementById('{one}').textContent") for one in ("where", "prompt", "difference")
        )

    def picture() -> str:
        return chromium.run("document.getElementById('image-b').src")

    assert shown() == ("1 of 4", HOSTILE[2], "▼ −1.00 shapes, B\u00a0−\u00a0A")
    assert picture() == image_url(tmp_path / "b", 2)
    chromium.click("next")
    assert shown() == ("2 of 4", HOSTILE[0], "▼ −0.50 shapes, B\u00a0−\u00a0A")
    assert picture() == image_url(tmp_path / "b", 0)
    chromium.press("ArrowRight")
    assert shown() == ("3 of 4", HOSTILE[3], "±0.00 shapes, B\u00a0−\u00a0A")
    chromium.press("End")
    assert shown()[0] == "4 of 4" and chromium.run("document.getElementById('next').disabled")
    chromium.press("ArrowLeft")
    chromium.click("previous")
    assert shown()[:2] == ("2 of 4", HOSTILE[0])
    visible = "[...document.querySelectorAll('figure')].map((one) => getComputedStyle(one).display).join()"
    for key, displays in (("f", "flex,none"), ("f", "none,flex"), ("Escape", "flex,flex")):
        chromium.press(key)
        assert chromium.run(visible) == displays
    chromium.click("find")
    chromium.type("owned")
    assert shown()[:2] == ("1 of 2", HOSTILE[0])
    chromium.run("const tag = $('tag'); tag.value = '<i>1</i>'; tag.dispatchEvent(new Event('change'))")
    assert shown()[:2] == ("1 of 1", HOSTILE[1])
    assert chromium.run("document.getElementById('total').textContent") == "−0.31"
    assert chromium.run("document.getElementById('name-a').textContent") == "A · <b>a"
    assert "owned" not in chromium.run("document.title")
    assert chromium.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert chromium.complaints == []


def image_url(folder: Path, sample: int) -> str:
    content = (folder / f"images/{sample:06d}.png").read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode()
