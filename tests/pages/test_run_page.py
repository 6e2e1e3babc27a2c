"""The page of a run: what it shows while the run goes and after it, and that it asks for nothing."""

import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.pages import live
from dgpo_fast.pages.live import LivePage
from dgpo_fast.pages.marks import Scale, ticks
from dgpo_fast.pages.run_page import RunView, run_page
from dgpo_fast.run.console import Console
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.browser import Browser, needs_chromium
from tests.pages.reader import Reader
from tests.profiling.reports import HOSTILE
from tests.servers import wait_for


def scores(mean: float, half: float = 0.05) -> dict[str, Any]:
    ends = [mean - half, mean + half]
    return {"reward_mean": mean, "reward_ci95": ends, "prompts": 40, "images": 80, "images_failed": 0}


def evaluation(mean: float, half: float = 0.05) -> dict[str, Any]:
    return scores(mean, half) | {"tags": {"count": scores(mean), "colours": scores(math.nan)}, "parts": {}}


def lines(count: int) -> list[dict[str, Any]]:
    """Metrics as a run has them, with an evaluation every tenth iteration, looks, and one iteration without rewards."""
    made = []
    for number in range(1, count + 1):
        line = {
            "iteration": number,
            "reward_mean": 0.4 + 0.3 * (1 - math.exp(-number / 30)) + 0.02 * math.sin(number * 2.4),
            "reward_std": 0.2,
            "reward/shapes_mean": 0.5,
            "reward/jpeg_mean": -30.0 - number / 10,
            "images_count": 256,
            "iteration_s": 4.0 + 0.1 * math.sin(number),
            "images_per_s": 64.0,
            "encode_s": 0.01,
            "rollout_s": 1.4,
            "decode_s": 0.3,
            "train_s": 2.1,
            "optimizer_s": 0.02,
            "loss": 0.69 - number / 1000,
            "kl": 1e-6 * number,
            "grad_norm": 0.1,
            "processes": [{"rollout_s": 1.0}],
        }
        if number % 10 == 0:
            line |= {"heldout_reward_mean": 0.45 + number / 300, "heldout_reward_ci95": [0.4, 0.5 + number / 300]}
            line |= {
                "look/reward_mean": 0.44,
                "look/reward_ci95": [0.40, 0.48],
                "look/sharpness_ratio": 1 + number / 50,
            }
        if number == 7:
            line["reward_mean"] = None
        made.append(line)
    return made


def view(folder: Path, **changes: Any) -> RunView:
    config = dataclasses.replace(get_recipe("tiny-shapes"), iterations=60, name="shapes")
    events = [(1.0e9, "run: runs/shapes"), (1.0e9 + 60, "iteration 7: group dropped: no answer")]
    shown = RunView(folder=folder, config=config, state="Training", live=True, lines=lines(37), events=events)
    return dataclasses.replace(shown, before=evaluation(0.45), **changes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two of the pictures that it may have."""
    folder = tmp_path / "runs" / "shapes"
    folder.mkdir(parents=True)
    Image.new("RGB", (900, 300), "#cde").save(folder / "progress.png")
    Image.new("RGB", (300, 300), "#edc").save(folder / "alarm-000020.png")
    return folder


def views(folder: Path) -> dict[str, RunView]:
    """A run at its beginning, in its middle, at its end, and with text that would break out of its place."""
    done = {"after": evaluation(0.61), "gain": evaluation(0.16)}
    hostile = dataclasses.replace(get_recipe("tiny-shapes"), model=HOSTILE, rewards=(HOSTILE,), name=HOSTILE)
    tags = evaluation(0.5) | {"tags": {HOSTILE: scores(0.5), "other": scores(0.5)}}
    return {
        "begun": dataclasses.replace(view(folder), lines=[], before=None, state="Evaluating the original model"),
        "one iteration": view(folder, lines=lines(1)),
        "goes": view(folder),
        "over": view(folder, live=False, state="Finished after 60 iterations", lines=lines(60), **done),
        "long": view(folder, lines=lines(2500)),
        "hostile": dataclasses.replace(
            view(folder), config=hostile, state=HOSTILE, before=tags, events=[(1.0e9, HOSTILE)], evaluated=HOSTILE
        ),
    }


NAMES = ["begun", "one iteration", "goes", "over", "long", "hostile"]


@pytest.mark.parametrize("name", NAMES)
def test_it_shows_pictures_beside_it_and_asks_for_nothing_else(name: str, run: Path) -> None:
    reader = Reader(run_page(views(run)[name]))
    addresses = [(tag, value) for tag, attribute, value in reader.attributes if attribute in ("href", "src")]
    pictures = [value.split("?")[0] for tag, value in addresses if tag == "img"]
    assert pictures == ["progress.png", "alarm-000020.png"]
    others = [value for tag, value in addresses if tag != "img"]
    assert all(re.fullmatch(r"#[a-z]+|data:,", value) for value in others)
    ids = {value for _, attribute, value in reader.attributes if attribute == "id"}
    assert {value[1:] for value in others if value.startswith("#")} <= ids
    assert reader.tags.count("script") == 1 and not [name for _, name, _ in reader.attributes if name.startswith("on")]
    if name == "hostile":
        assert sum(HOSTILE in text for text in reader.text) > 4, "it is shown as it is"


def test_what_stands_on_it(run: Path) -> None:
    """Numbers are those of the run; a run that is over does not load again."""
    shown = views(run)
    goes, over = (" ".join(Reader(run_page(shown[name])).text) for name in ("goes", "over"))
    assert "37 of 60" in goes and "The reward on held-out prompts went from 0.450 to 0.550." in goes
    assert "0.450 ± 0.050" in goes and "+0.160 ± 0.050" in over and "count" in over
    assert "iteration 7: group dropped: no answer" in goes
    assert 'data-reload="10"' in run_page(shown["goes"]) and "data-reload" not in run_page(shown["over"])
    assert "sharpness, over the base model's" in goes and "Reward: jpeg" in goes
    assert "<span>left</span>" in run_page(shown["goes"]) and "<span>left</span>" not in run_page(shown["over"])
    assert len(run_page(shown["long"])) < 500_000, "as many iterations as a run may have"


def test_ticks_are_round_and_within() -> None:
    assert ticks(1.0, 5) == [0.0, 0.2, pytest.approx(0.4), pytest.approx(0.6), 0.8, 1.0]
    assert ticks(-30.0, 4, -35.0) == [-34.0, -32.0, -30.0]
    assert ticks(0.0) == [0.0] and ticks(3.0, 5, 3.0) == [3.0]
    scale = Scale([0.5, math.nan])
    assert 0 < scale(0.5) < 1 and all(0 <= at <= 1 for at, _ in scale.labels(str))


OWN_REWARD = """
import shutil
from pathlib import Path

pages = []

def copying(images, prompts, metadata):
    page = Path("runs/run/index.html")
    pages.append(page.read_text() if page.is_file() else "")
    return images.mean((1, 2, 3))
"""


def test_a_run_keeps_its_page(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there before the first evaluation, follows each iteration, and is kept up by a resumed run."""
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    monkeypatch.syspath_prepend(workspace)
    Path("watching.py").write_text(OWN_REWARD)
    assert (
        train(["small.yaml", "--rewards", "watching:copying", "--iterations", "2", "--optimizer.lr-decay", "none"]) == 0
    )
    pages = sys.modules["watching"].pages
    during = [page for page in pages if page]
    assert "Evaluating the original model" in during[0] and "0 of 2" in during[0]
    assert any("1 of 2" in page and "Training" in page and "data-reload" in page for page in during)
    assert "Evaluating the trained model" in during[-1]
    page = Path("runs/run/index.html").read_text()
    assert "Finished after 2 iterations" in page and "data-reload" not in page
    gain = json.loads(Path("runs/run/summary.json").read_text())["gain"]["reward_mean"]
    assert f"{gain:+.3f}" in page and "the trained weights are in runs/run" in page
    assert train(["--resume", "runs/run", "--iterations", "3"]) == 0
    page = Path("runs/run/index.html").read_text()
    assert "Finished after 3 iterations" in page and "resuming after iteration 2" in page
    assert page.count("the trained weights are in runs/run") == 2, "what the first start said is still there"


@pytest.mark.parametrize(
    ("error", "state"),
    [(UserError("no\nspace"), "Ended by an error (no space) after 1 iteration"), (KeyboardInterrupt(), "Interrupted")],
)
def test_a_run_that_breaks_off_says_so(
    error: BaseException, state: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trainer: Trainer) -> None:
        if trainer.iteration == 1:
            raise error
        step(trainer)

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(type(error)):
        train(["small.yaml", "--iterations", "3"])
    page = Path("runs/run/index.html").read_text()
    assert state in page and "--resume runs/run" in page and "data-reload" not in page


def test_a_page_that_cannot_be_written_is_one_note(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run goes on."""
    page = LivePage(run, get_recipe("tiny-shapes"), Console(), "held-out prompts", 0)
    (run / "index.html").mkdir()
    for state in ("one", "two"):
        page.say(state)
    assert capsys.readouterr().out.splitlines() == [f"{run}/index.html is no longer written: Is a directory"]
    LivePage(run / "gone", get_recipe("tiny-shapes"), Console(), "held-out prompts", 0).say("nothing to write to")
    assert not (run / "gone").exists()


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", NAMES)
def test_in_a_browser(name: str, width: int, chromium: Browser, run: Path) -> None:
    """No console message, no request but for the files, no sideways scrolling, and its pictures are there."""
    file = run / "index.html"
    file.write_text(run_page(views(run)[name]), encoding="utf-8")
    chromium.open(file, width, 900)
    assert chromium.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert chromium.run("[...document.images].map(image => image.naturalWidth).join()") == "900,300"
    assert chromium.run("document.title") != "owned"
    wanted = {file.as_uri(), *((run / picture).as_uri() for picture in ("progress.png", "alarm-000020.png"))}
    assert {address.split("?")[0] for address in chromium.requests} == wanted and chromium.complaints == []


@needs_chromium
def test_it_loads_itself_again_while_the_run_lives(chromium: Browser, run: Path) -> None:
    """Not while a part of it is opened. If the run says nothing for long, the page does."""
    file, shown = run / "index.html", views(run)["goes"]
    page = run_page(shown).replace('data-reload="10"', 'data-reload="1"')
    file.write_text(page, encoding="utf-8")
    chromium.open(file, 1280, 900)
    assert chromium.run("document.getElementById('silent').hidden")

    def asked(script: str) -> Any:
        """What the page answers; None while it is being loaded."""
        try:
            return chromium.run(script)
        except AssertionError:
            return None

    def is_kept() -> bool:
        """Whether the page that was opened is still there; if it was about to load again, the next one is opened."""
        kept = asked("window.same")
        asked("document.querySelector('details').open = true; window.same = true")
        time.sleep(0.2)
        return bool(kept)

    wait_for(is_kept, 20)
    page = re.sub(r'data-since="\d+"', 'data-since="0"', page).replace("Training<", "Trained on<")
    file.write_text(page, encoding="utf-8")
    time.sleep(1.5)
    assert asked("window.same")
    asked("document.querySelector('details').open = false")
    wait_for(lambda: "Trained on" in str(asked("document.body && document.body.textContent")), 20)
    wait_for(lambda: asked("document.getElementById('silent').hidden") is False, 20)
