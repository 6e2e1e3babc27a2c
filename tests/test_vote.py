"""`python -m dgpo_fast.vote`: its page, what is kept of the votes, and who may ask it for what."""

import json
import os
import secrets
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from safetensors.numpy import load_file
from starlette.testclient import TestClient

from dgpo_fast.config.command_line import configure
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.preferences import groups_of, read_preferences
from dgpo_fast.rewards.serving.server import listen
from dgpo_fast.run.console import Console
from dgpo_fast.train import train
from dgpo_fast.voting import server
from dgpo_fast.voting.command import vote
from dgpo_fast.voting.drawing import GroupDrawing
from dgpo_fast.voting.folder import VoteFolder
from dgpo_fast.voting.page import vote_page
from dgpo_fast.voting.server import Session, application
from dgpo_fast.voting.settings import prompts_to_vote_on, read_vote_settings, train_command
from tests.browser import Browser, needs_chromium
from tests.servers import wait_for
from tests.texts import message

TOKEN = "a-token-of-the-test"
GROUPS, DRAWN, SIZE = 5, 4, 3
HOSTILE = "prompt {} <img src=x onerror=\"document.title='owned'\">"


def open_folder(path: Path) -> VoteFolder:
    """As a start of the command does. A prompt's metadata has what could be taken for a judgement."""
    prompts = [Prompt(HOSTILE.format(n), {"tag": "t", "like": True}, negative="blurry") for n in range(GROUPS)]
    folder = VoteFolder(path, prompts, SIZE)
    folder.read_votes()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> VoteFolder:
    """Five groups of three pictures, of which four are drawn."""
    (tmp_path / "votes").mkdir()
    folder = open_folder(tmp_path / "votes")
    folder.begin({"model": "tiny", "images_per_prompt": SIZE, "prompts_sha256": "p"})
    rng = np.random.default_rng(0)
    for number in range(DRAWN * SIZE):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder.picture(number))
    return folder


def app_of(folder: VoteFolder) -> Any:
    drawing = GroupDrawing(folder, None, Console(quiet=True), 0)
    return application(Session(folder, drawing, "best", "train on it"), vote_page(folder.path), TOKEN)


def client_of(folder: VoteFolder) -> TestClient:
    return TestClient(app_of(folder), base_url=f"http://127.0.0.1/{TOKEN}/")


def say(client: TestClient, group: int, said: str, *values: int) -> Any:
    answer = client.post("vote", json={"group": group, "said": said, "values": list(values)})
    assert answer.status_code == 200, answer.text
    return answer.json()


# What is kept


def test_votes_become_preferences(folder: VoteFolder) -> None:
    """The best one, an order, stars, and a skip, of which nothing is learned; the prompt keeps all that it has."""
    client = client_of(folder)
    assert client.get("state").json()["group"]["pictures"] == [f"pictures/{number}.png" for number in range(3)]
    say(client, 0, "rank", 2, 1, 2)
    say(client, 1, "rank", 3, 2, 1)
    say(client, 2, "skip")
    state = say(client, 3, "rating", 5, 1, 3)
    assert (state["voted"], state["skipped"], state["total"], state["group"]) == (4, 1, GROUPS, None)
    found = groups_of(read_preferences(folder.path))
    assert [(group.kind, group.scores) for group in found] == [
        ("rank", (-0.5, 1.0, -0.5)),
        ("rank", (-1.0, 0.0, 1.0)),
        ("rating", (5.0, 1.0, 3.0)),
    ]
    assert [group.prompt.text for group in found] == [HOSTILE.format(n) for n in (0, 1, 3)]
    assert {(group.prompt.negative, group.prompt.tag) for group in found} == {("blurry", "t")}
    assert found[2].images == tuple(folder.picture(number) for number in folder.numbers(3))


def test_undo_takes_one_vote_after_another_back(folder: VoteFolder) -> None:
    client = client_of(folder)
    say(client, 0, "rank", 1, 2, 3)
    say(client, 1, "skip")
    assert client.post("undo").json()["group"]["number"] == 1
    assert client.post("undo").json()["group"]["number"] == 0
    assert client.post("undo").json()["voted"] == 0, "there is nothing left to take back"
    assert (folder.path / "preferences.jsonl").read_text() == ""
    say(client, 0, "rank", 3, 2, 1)
    assert open_folder(folder.path).votes == folder.votes, "the next start reads the same"


def test_a_kill_at_any_byte_loses_no_vote(folder: VoteFolder) -> None:
    """While a vote is written, or before the preferences have it: all that was answered to the page is there."""
    client = client_of(folder)
    say(client, 0, "rank", 1, 2, 3)
    before = (folder.path / "preferences.jsonl").read_text()
    say(client, 1, "rank", 1, 1, 1)
    after, log = (folder.path / "preferences.jsonl").read_text(), (folder.path / "votes.jsonl").read_bytes()
    first = log.index(b"\n") + 1
    for cut in (*range(first, len(log), 6), len(log)):
        (folder.path / "votes.jsonl").write_bytes(log[:cut])
        (folder.path / "preferences.jsonl").write_text(before)
        again = open_folder(folder.path)
        whole = cut == len(log)
        assert list(again.votes) == ([0, 1] if whole else [0])
        assert (folder.path / "preferences.jsonl").read_text() == (after if whole else before)
    say(client_of(again), 2, "skip")
    assert list(open_folder(folder.path).votes) == [0, 1, 2]


def test_a_file_that_somebody_changed_is_not_written_over(folder: VoteFolder) -> None:
    say(client_of(folder), 0, "rank", 1, 2, 3)
    with (folder.path / "preferences.jsonl").open("a") as file:
        file.write('{"prompt": "mine", "image": "mine.png", "like": true}\n')
    assert "preferences.jsonl: was changed by something else than the page" in message(open_folder, folder.path)


def test_damage_and_too_few_groups_are_one_line(folder: VoteFolder) -> None:
    log = folder.path / "votes.jsonl"
    for line in ("[]", '{"group": "x"}', "{"):
        log.write_text(f"{line}\n")
        assert "votes.jsonl: a line is damaged" in message(open_folder, folder.path)
    log.write_text('{"group": 7, "said": "skip", "values": []}\n')
    assert message(open_folder, folder.path).startswith("--groups 5: ")


def test_one_person_at_a_time(folder: VoteFolder) -> None:
    lock = folder.lock()
    assert f"process {os.getpid()} on " in message(open_folder(folder.path).lock)
    lock.release()
    folder.lock().release()


def test_pictures_of_something_else_are_refused(folder: VoteFolder, tmp_path: Path) -> None:
    remedy = "choose another --output, or remove that folder"
    made = {"model": "tiny", "images_per_prompt": SIZE, "prompts_sha256": "p"}
    folder.require_same(made)
    assert message(folder.require_same, {**made, "images_per_prompt": 9}) == (
        f"{folder.path} was made with group_size 3, not 9: {remedy}"
    )
    changed = f"{folder.path}: the prompts changed since its pictures were drawn: {remedy}"
    assert message(folder.require_same, {**made, "prompts_sha256": "q"}) == changed


# Who may ask for what


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"group": 0, "said": "rank", "values": [1, 2]}, 400),
        ({"group": 0, "said": "rank", "values": [1, 2, 4]}, 400),
        ({"group": 0, "said": "rank", "values": [1, 2, True]}, 400),
        ({"group": 0, "said": "rating", "values": [1, 2, 6]}, 400),
        ({"group": 0, "said": "skip", "values": [1, 2, 3]}, 400),
        ({"group": 0, "said": ["rank"], "values": [1, 2, 3]}, 400),
        ({"group": 0, "said": "like", "values": [1, 1, 1]}, 400),
        ({"group": 4, "said": "skip", "values": []}, 409),
        ({"group": -1, "said": "skip", "values": []}, 409),
        ({"group": "0", "said": "skip", "values": []}, 409),
        ([], 400),
        ("{" * 5000, 400),
        ("x" * 20_000, 413),
    ],
)
def test_what_is_no_vote_is_refused(folder: VoteFolder, body: Any, status: int) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    assert client_of(folder).post("vote", content=content).status_code == status
    assert folder.votes == {} and not (folder.path / "votes.jsonl").exists()


def test_a_group_is_voted_on_once(folder: VoteFolder) -> None:
    """Another window that still shows it is told so."""
    client = client_of(folder)
    say(client, 0, "rank", 1, 2, 3)
    answer = client.post("vote", json={"group": 0, "said": "skip", "values": []})
    assert (answer.status_code, answer.text) == (409, "another window has voted on this group")


@pytest.mark.parametrize(
    "address",
    [
        "/",
        "/state",
        "/wrong/state",
        "/wrong/",
        f"/{TOKEN[:-1]}/",
        f"/{TOKEN}",
        f"/{TOKEN}/votes.jsonl",
        f"/{TOKEN}/pictures/",
        f"/{TOKEN}/pictures/000001.PNG",
        f"/{TOKEN}/pictures/-1.png",
        f"/{TOKEN}/pictures/{DRAWN * SIZE}.png",
        f"/{TOKEN}/pictures/..%2fvote.yaml",
        f"/{TOKEN}/pictures/%2e%2e/vote.yaml",
        f"/{TOKEN}/../{TOKEN}/pictures/..%5cvote.yaml",
        "/%ff/",
    ],
)
def test_nothing_else_is_served(folder: VoteFolder, address: str) -> None:
    client = TestClient(app_of(folder), base_url="http://127.0.0.1")
    assert client.get(address).status_code == 404
    assert client.get(f"/{TOKEN}/pictures/0.png").content == folder.picture(0).read_bytes()


@pytest.mark.parametrize("host", ["attacker.example", "127.0.0.1.attacker.example", "192.168.0.7:8765", ""])
def test_other_hosts_are_refused(folder: VoteFolder, host: str) -> None:
    """A name of somebody else's that was pointed at this machine comes with that name."""
    client = client_of(folder)
    for path in ("", "state", "pictures/0.png"):
        assert client.get(path, headers={"Host": host}).status_code == 400
    assert client.get("state", headers={"Host": "localhost:8765"}).status_code == 200


def test_the_page_asks_nobody_else(folder: VoteFolder) -> None:
    page = client_of(folder).get("")
    assert "default-src 'none'" in page.text and "http" not in page.text.replace("http-equiv", "")
    assert page.headers["X-Frame-Options"] == "DENY" and page.headers["Referrer-Policy"] == "no-referrer"


# The command


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("", "command line: name a run's folder or a model, as in `python -m dgpo_fast.vote tiny`"),
        ("--groups 3", "command line: name a run's folder or a model, as in `python -m dgpo_fast.vote tiny`"),
        ("runs/none", "runs/none: no such run or folder"),
        ("tyni", "model 'tyni': no such folder, and no name on the hub (organisation/name)"),
        ("tiny --prompts none.txt", "none.txt: no such prompt file: check the path"),
        ("tiny --images 3", "command line: --images is a setting of evaluations: use --groups"),
        ("tiny --group-size 1", "command line: group_size: input should be greater than or equal to 2, not '1'"),
        ("tiny --ask stars", "command line: ask: input should be 'best', 'rank' or 'rate', not 'stars'"),
        ("tiny --grups 3", "command line: unknown setting 'grups'"),
        ("tiny --output .", ". exists and holds no votes: choose another --output"),
        ("tiny --port {port}", "--port {port}: cannot listen there (Address already in use): choose another"),
    ],
)
def test_a_mistake_is_one_line(args: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("keep me")
    with listen("127.0.0.1", 0, "") as taken:
        port = taken.getsockname()[1]
        assert message(vote, args.format(port=port).split()).startswith(line.format(port=port))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"], "nothing is made"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("tiny", "tiny-shapes --data.source preferences --data.preferences votes/tiny --policy.train lora"),
        (
            "tiny --prompts my.txt --lora a.safetensors --resolution 48",
            "tiny-shapes --data.source preferences --data.preferences votes/tiny-a-my --policy.train lora "
            "--lora a.safetensors --rollout.resolution 48 --rewards pickscore",
        ),
        (
            "org/model --recipe sd35m-ocr --output my",
            "sd35m-ocr --data.source preferences --data.preferences my --model org/model",
        ),
    ],
)
def test_the_command_that_trains(args: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("a\nb\na\n")
    own, settings, base = read_vote_settings(args.split())
    command = train_command(settings, base, any_objective=True)
    assert command == f"python -m dgpo_fast.train {expected}"
    config = configure(shlex.split(command)[3:])
    assert (config.policy.train, config.data.preferences) == ("lora", settings.output)
    if settings.prompts == "my.txt":
        assert [prompt.text for prompt in prompts_to_vote_on(settings, base)] == ["a", "b"]
    assert own.group_size == settings.images_per_prompt


# The page


@pytest.fixture
def served(folder: VoteFolder) -> Iterator[str]:
    """The address of a page whose votes go to `folder`."""
    with listen("127.0.0.1", 0, "") as listener:
        serving = uvicorn.Server(uvicorn.Config(app_of(folder), log_config=None, lifespan="off"))
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}/"
        serving.should_exit = True
        thread.join()


def said_of(folder: VoteFolder) -> list[tuple[str, tuple[int, ...]]]:
    return [(one.said, one.values) for one in folder.votes.values()]


def wait_for_group(chromium: Browser, number: int) -> None:
    """Until the page shows its prompt."""
    shown = "document.getElementById('prompt').textContent"
    wait_for(lambda: chromium.run(shown) == HOSTILE.format(number))


@needs_chromium
def test_by_keyboard_alone(chromium: Browser, served: str, folder: VoteFolder) -> None:
    """All three ways, undo and skip. A prompt is never more than text, and nobody else is asked for anything."""
    chromium.open(served, 1280, 900)
    wait_for_group(chromium, 0)
    chromium.press("2")
    wait_for(lambda: said_of(folder) == [("rank", (2, 1, 2))])
    wait_for_group(chromium, 1)
    chromium.press("u")
    wait_for(lambda: said_of(folder) == [])
    wait_for_group(chromium, 0)
    for key in "m31":
        chromium.press(key)
    wait_for(lambda: said_of(folder) == [("rank", (2, 3, 1))])
    wait_for_group(chromium, 1)
    for key in ("3", "Enter"):
        chromium.press(key)
    wait_for(lambda: said_of(folder)[1:] == [("rank", (2, 2, 1))])
    wait_for_group(chromium, 2)
    for key in ("m", "4", "1", "5", "ArrowLeft", "2", "Enter"):
        chromium.press(key)
    wait_for(lambda: said_of(folder)[2:] == [("rating", (4, 2, 5))])
    wait_for_group(chromium, 3)
    chromium.press("s")
    wait_for(lambda: said_of(folder)[3:] == [("skip", ())])
    wait_for(lambda: not chromium.run("document.getElementById('wait').hidden"))
    assert chromium.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert chromium.run("document.title") == "Vote · votes" and chromium.complaints == []
    assert all(address.startswith((served, "data:")) for address in chromium.requests)


@needs_chromium
def test_by_touch(chromium: Browser, served: str, folder: VoteFolder) -> None:
    """On a narrow screen, where nothing scrolls sideways."""
    chromium.open(served, 390, 844)
    chromium.run("sessionStorage.clear()")
    chromium.open(served, 390, 844)
    wait_for_group(chromium, 0)
    chromium.tap("#pictures figure:nth-child(2) .pick")
    wait_for(lambda: said_of(folder) == [("rank", (2, 1, 2))])
    wait_for_group(chromium, 1)
    chromium.tap("fieldset label:nth-child(3)")
    for picture, star in enumerate((3, 1, 5), start=1):
        chromium.tap(f"#pictures figure:nth-child({picture}) .stars button:nth-child({star})")
    assert chromium.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    chromium.tap("#next")
    wait_for(lambda: said_of(folder)[1:] == [("rating", (3, 1, 5))])
    wait_for_group(chromium, 2)
    chromium.tap("#skip")
    wait_for(lambda: said_of(folder)[2:] == [("skip", ())])
    wait_for_group(chromium, 3)
    chromium.tap("#group .undo")
    wait_for(lambda: len(folder.votes) == 2)
    assert chromium.complaints == []


def test_from_a_run_to_votes_to_a_lora(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person votes on what a run has learned to draw, goes on with more groups, and trains with the printed line.
    Pictures are drawn as an undisturbed vote draws them, of prompts that the run has trained on."""
    assert train(["small.yaml", "--iterations=1"]) == 0
    monkeypatch.setattr(secrets, "token_urlsafe", lambda size: TOKEN)
    args = ["runs/run", "--group-size", "2", "--groups"]

    def person(app: Any, listener: Any) -> None:
        client = TestClient(app, base_url=f"http://127.0.0.1/{TOKEN}/")
        while (state := client.get("state").json())["voted"] < state["total"]:
            assert not state["fault"]
            if state["group"]:
                say(client, state["group"]["number"], "rank", 2, 1)
            else:
                time.sleep(0.02)  # the next group is being drawn

    monkeypatch.setattr(server, "serve", person)

    def run(groups: int) -> str:
        capsys.readouterr()
        assert vote([*args, str(groups), "--port", "0"]) == 0
        return capsys.readouterr().out

    out = run(2)
    assert "2 votes of 2 groups in votes/run" in out and "go on" not in out
    first = {path.name: path.read_bytes() for path in Path("votes/run/pictures").iterdir()}
    out = run(5)
    assert "5 votes of 5 groups in votes/run" in out
    pictures = {path.name: path.read_bytes() for path in Path("votes/run/pictures").iterdir()}
    assert len(pictures) == 10 and first.items() <= pictures.items() and len(set(pictures.values())) == 10
    found = groups_of(read_preferences("votes/run"))
    assert [group.scores for group in found] == [(-1.0, 1.0)] * 5
    (command,) = [line.partition("train on them: ")[2] for line in out.splitlines() if "train on them: " in line]
    capsys.readouterr()
    assert train([*shlex.split(command)[3:], "--iterations=1", "--runs-dir=learned"]) == 0
    (learned,) = Path("learned").iterdir()
    before, after = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (Path("runs/run"), learned))
    ranks = [{len(weight) for name, weight in lora.items() if "lora_A" in name} for lora in (before, after)]
    assert ranks == [{4}, {8}], "the new LoRA holds the run's and what the votes have added"
