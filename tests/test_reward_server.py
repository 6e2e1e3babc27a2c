"""The reward server as a process: what it scores, whom it answers, what it refuses, and how it ends."""

import base64
import io
import json
import os
import pickle
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dgpo_fast.config.command_line import run_command
from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import WeightedReward, golden, load_rewards
from dgpo_fast.rewards.remote import png
from dgpo_fast.rewards.remote.client import TOKEN_VARIABLE, RemoteReward
from dgpo_fast.rewards.remote.http_client import JsonClient, Reply, Unanswered
from dgpo_fast.rewards.serving.server import serve
from tests.servers import Process, answering, free_port, reward_server, wait_for

TOKEN = "0123456789abcdef-token"
OWN_REWARDS = """
import threading, time

class Slow:
    "Takes its time, and would notice a second caller."
    def __init__(self):
        self.busy = threading.Lock()
    def __call__(self, images, prompts, metadata):
        assert self.busy.acquire(blocking=False), "two at a time"
        time.sleep(metadata[0].get("seconds", 0.0))
        self.busy.release()
        return images.mean((1, 2, 3))

def picky(images, prompts, metadata):
    if prompts[0] == "raise":
        raise RuntimeError("no score for this one")
    return [float(prompts[0])] * len(images)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    (folder / "own.py").write_text(OWN_REWARDS)
    (folder / "token.txt").write_text(f"{TOKEN}\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path):
    with reward_server(
        "--reward",
        "slow=own:Slow",
        "--max-images",
        "8",
        "--max-megapixels",
        "1",
        "--max-body-mib",
        "4",
        "--max-waiting",
        "80",
        folder=folder,
    ) as running:
        yield running
        status, _, errors = running.stop()
        assert (status, errors) == (0, ""), "nothing that was sent surprised it"


def picture(value: int = 100, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def as_text(image: np.ndarray) -> str:
    return base64.b64encode(png.encode_png(image)).decode()


def request(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "metadata": {}, "images": [as_text(picture())], **changes}


def post(server: Process, body: Any, path: str = "/score") -> Any:
    """What the server answers, or its status and message."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        return JsonClient(server.url, attempts=1, deadline_s=20).post(path, data).content
    except Unanswered as error:
        return error.status, str(error)


def raw(server: Process, data: bytes, close: bool = True) -> bytes:
    """The answer to whatever is sent, to its end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def serves(server: Process) -> bool:
    return post(server, request())["scores"] == [100]


# What it scores


def test_a_remote_reward_scores_as_the_reward_itself(folder: Path) -> None:
    """Same scores and parts for the same pictures, and what the queue cost beside them."""
    images = np.random.default_rng(0).integers(0, 256, (6, 24, 16, 3), dtype=np.uint8)
    prompts = [Prompt("a cat", {"tag": "x"}), Prompt('größe "中文" \u2028'), Prompt("c")]
    at_home = load_rewards(["jpeg=-2"]).score_groups(images, prompts, 2)
    with reward_server("--reward", "jpeg=-2", folder=folder) as server:
        far = load_rewards([f"far={server.url}=0.5"]).score_groups(images, prompts, 2)
    assert far.valid.all() and not far.failures
    np.testing.assert_allclose(far.rewards, 0.5 * at_home.rewards, rtol=1e-6)
    np.testing.assert_array_equal(far.parts["far"], at_home.rewards)
    np.testing.assert_array_equal(far.parts["far/jpeg/kilobytes"], at_home.parts["jpeg/kilobytes"])
    assert (far.parts["far/latency_s"] > 0).all() and (far.parts["far/attempts"] == 1).all()
    assert far.parts["far/queue"].max() >= 0


def test_pictures_with_several_prompts_are_asked_for_one_by_one(folder: Path) -> None:
    with reward_server("--reward", "own:picky", folder=folder) as server:
        reward = RemoteReward(server.url)
        scores, _ = reward(np.zeros((5, 8, 8, 3), np.uint8), ["1", "1", "2", "1", "3.5"], [{}] * 5)
        assert scores.tolist() == [1, 1, 2, 1, 3.5]
        assert reward(np.zeros((0, 8, 8, 3), np.uint8), [], [])[0].shape == (0,)
        with pytest.raises(UserError, match="images must be uint8"):
            reward(np.zeros((1, 8, 8, 3), np.float32), ["1"], [{}])
        reward = load_rewards([server.url])
        scores = reward.score_groups(np.zeros((2, 8, 8, 3), np.uint8), [Prompt("raise", {}, "p.txt:2"), Prompt("4")], 1)
    assert scores.valid.tolist() == [False, True]
    assert "p.txt:2" in scores.failures[0] and "RuntimeError: no score for this one" in scores.failures[0]


def test_the_server_refuses_prompts_before_the_run_by_their_line(folder: Path) -> None:
    """A key that chooses among the run's rewards stays with the run."""
    with reward_server("--reward", "shapes", folder=folder) as server:
        reward = load_rewards([f"far={server.url}"])
        star = {"include": [{"class": "star", "count": 1}], "reward": "far"}
        prompts = [Prompt("a star", star, f"p.jsonl:{line}") for line in range(1, 2501)]
        reward.check_prompts(prompts)
        prompts[2222] = Prompt("a dog", {"include": [{"class": "dog", "count": 1}]}, "p.jsonl:2223")
        with pytest.raises(UserError, match=r"^p\.jsonl:2223: reward 'shapes' has no class 'dog': use one of circle"):
            reward.check_prompts(prompts)
        # Also where a prompt is only seen when it is scored.
        with pytest.raises(UserError, match=r"^'a dog': reward 'shapes' has no class 'dog'"):
            reward.score_groups(np.zeros((1, 32, 32, 3), np.uint8), prompts[2222:2223], 1)


def test_health_says_what_runs_and_what_waits(server: Process) -> None:
    health = JsonClient(server.url).get("/health").content
    assert health["rewards"] == {"slow": 1.0} and health["queue"] == 0 and health["independent_images"] is False
    assert health["limits"] == {"images": 8, "pixels": 1_000_000}
    before = health["images"]
    post(server, request(images=[as_text(picture())] * 3))
    assert JsonClient(server.url).get("/health").content["images"] == before + 3


# Whom it answers


def test_64_clients_at_once_queue_up(server: Process) -> None:
    """Each gets its own scores, the reward works for one at a time, and the queue shows in the metrics."""

    def ask(number: int) -> tuple[float, float]:
        reward = RemoteReward(server.url)
        scores, parts = reward(picture(number)[None], [f"p{number}"], [{"seconds": 0.01}])
        return float(scores[0]), float(parts["queue"][0])

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert [score for score, _ in answers] == list(range(64))
    assert max(queue for _, queue in answers) > 5


def test_too_many_are_turned_away_and_come_again(folder: Path) -> None:
    with reward_server("--reward", "own:Slow", "--max-waiting", "2", folder=folder) as server:

        def ask(number: int) -> tuple[float, float]:
            scores, parts = RemoteReward(server.url)(picture(number)[None], ["p"], [{"seconds": 0.1}])
            return float(scores[0]), float(parts["attempts"][0])

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        assert [score for score, _ in answers] == list(range(8)) and max(tries for _, tries in answers) > 1


def test_a_token_is_needed_where_there_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with reward_server("--reward", "jpeg", "--token-file", "token.txt", "--host", "0.0.0.0", folder=folder) as server:
        server.url = f"http://127.0.0.1:{server.port}"
        assert "with a token" in server.first_line and TOKEN not in server.first_line
        wanted = f"reward server {server.url} wants a token: put it into the environment variable {TOKEN_VARIABLE}"
        with pytest.raises(UserError) as caught:
            load_rewards([server.url])
        assert str(caught.value) == wanted
        monkeypatch.setenv(TOKEN_VARIABLE, "wrong" + TOKEN)
        with pytest.raises(UserError) as caught:
            load_rewards([server.url])
        assert str(caught.value) == wanted.replace("wants a token: put it into", "refuses the token in")
        for authorization in (
            "",
            f"Authorization: {TOKEN}x\r\n",
            "Authorization: Bearer \r\n",
            "Authorization: \xff\r\n",
        ):
            answer = raw(server, f"GET /health HTTP/1.1\r\nHost: a\r\n{authorization}\r\n".encode("latin-1"))
            assert answer.startswith(b"HTTP/1.1 401 "), answer
        # A large request of a stranger is refused before it is read, and the reason arrives.
        assert post(server, b" " * 2_000_000) == (401, "the token is missing or wrong")
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        scores = load_rewards([server.url]).score_groups(picture()[None], [Prompt("p")], 1)
        assert scores.valid.all()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("", "command line: no reward: name at least one, as in --reward ocr"),
        ("--reward jpeg --host 0.0.0.0", "--host 0.0.0.0: others could reach the server, so it needs --token-file: `"),
        ("--reward jpeg --host ::", "--host ::: others could reach the server, so it needs --token-file: `"),
        ("--reward jpeg --token-file none.txt", "--token-file none.txt: cannot be read ("),
        ("--reward jpeg --token-file short.txt", "--token-file short.txt: needs one word of 16 letters or more"),
        ("--reward jpeg --token-file words.txt", "--token-file words.txt: needs one word of 16 letters or more"),
        (
            "--reward jpeg --host no.such.host.invalid --token-file good.txt",
            "--host no.such.host.invalid --port 8000: ",
        ),
        ("--reward jpeg --port TAKEN", "--host 127.0.0.1 --port TAKEN: cannot listen there (Address already in use"),
        ("--reward jpeg --port 70000", "command line: port: input should be less than or equal to 65535, not '70000'"),
        ("--reward jpge", "no reward 'jpge': did you mean 'jpeg'? "),
        ("--rewards jpeg", "command line: unknown setting 'rewards': did you mean 'reward'?"),
    ],
)
def test_bad_settings_give_one_line(args, expected, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"short": "abc", "words": "two words are none", "good": TOKEN}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["reward_server", *args.replace("TAKEN", port).split()])
        assert run_command(serve) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"error: {expected.replace('TAKEN', port)}")


@pytest.mark.parametrize("library", ["starlette", "uvicorn"])
def test_without_its_libraries_it_says_what_to_install(library: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None; sys.argv = ['reward_server', '--reward', 'jpeg']; "
        "from dgpo_fast.config.command_line import run_command; from dgpo_fast.rewards.serving.server import serve; "
        "sys.exit(run_command(serve))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    expected = 'python -m dgpo_fast.reward_server needs starlette and uvicorn: pip install "dgpo_fast[server]"'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {expected}\n")


def test_rewards_may_be_named_one_by_one(folder: Path) -> None:
    with reward_server("--reward", "jpeg", "--reward=shapes=0.5", folder=folder) as server:
        assert JsonClient(server.url).get("/health").content["rewards"] == {"jpeg": 1.0, "shapes": 0.5}
        assert load_rewards([server.url]).dependent_images is None, "both score each picture on its own"


# The client's health check


def test_no_server_is_one_clear_line() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError) as caught:
        load_rewards([url])
    assert str(caught.value) == (
        f"no reward server answers: {url}: Connection refused: start it with "
        "`python -m dgpo_fast.reward_server --reward NAME`, or fix the address"
    )


def test_another_kind_of_server_is_none() -> None:
    with answering(lambda *_: {"hello": 1}) as url, pytest.raises(UserError, match="names no rewards"):
        load_rewards([url])
    with answering(lambda *_: (404, {})) as url, pytest.raises(UserError, match="no reward server answers: status 404"):
        load_rewards([url])


@pytest.mark.parametrize("change", [lambda image: image[..., ::-1], lambda image: image // 255])
def test_swapped_channels_and_wrong_ranges_on_the_way_are_seen(server, monkeypatch, change) -> None:
    original = png.encode_png
    monkeypatch.setattr(png, "encode_png", lambda image: original(np.ascontiguousarray(change(image))))
    with pytest.raises(UserError, match="failed its self-test: coloured squares arrived changed"):
        load_rewards([server.url])


def test_a_server_of_another_make_needs_health_and_score_alone() -> None:
    def answer(path: str, body: bytes, _: Any) -> Any:
        if path == "/health":
            return {"rewards": {"deqa": 1}}
        return {"scores": [0.5] * len(json.loads(body)["images"])} if path == "/score" else (404, {})

    with answering(answer) as url:
        reward = load_rewards([url])
        reward.check_prompts([Prompt("p")])
        assert reward.score_groups(np.stack([picture()] * 2), [Prompt("p")], 2).rewards.tolist() == [[0.5, 0.5]]


def test_a_server_without_check_scores_golden_pictures_at_the_start() -> None:
    """For the run's first prompt, since a server may need its metadata; what it says of them must be scores."""
    asked, answers = [], {"scores": [0.1, 0.2, 0.3, 0.4]}

    def answer(path: str, body: bytes, _: Any) -> Any:
        if path == "/health":
            return {"rewards": {"deqa": 1}}
        if path != "/score":
            return 404, {}
        asked.append(json.loads(body))
        return answers

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            reward.check_prompts(prompts)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(url, "URL")

    prompts = [Prompt("two cats", {"include": [1], "reward": "far"}, "p.jsonl:1"), Prompt("a dog")]
    with answering(answer) as url:
        reward = load_rewards([f"far={url}"])
        reward.check_prompts([])
        assert asked == []
        reward.check_prompts(prompts)
        (request,) = asked
        sent = np.stack([png.decode_png(base64.b64decode(one), 10**6) for one in request["images"]])
        assert (sent == golden.squares()).all()
        assert request["prompt"] == "two cats" and request["metadata"] == {"include": [1]}
        start = "URL failed its self-test with 4 coloured squares and the prompt 'two cats': "
        end = ": fix its /score (docs/rewards.md)"
        for scores, seen in (
            ([0.1], "scores: 1 numbers for 4 pictures"),
            ([[0.1]] * 4, "scores: no numbers: [[0.1], [0.1], [0.1], [0.1]]"),
            ([1, 2, 3, 1e999], "answers with something that is not JSON: "),
            ([1, 2, 3, 1e60], "returned infinity, or a number beyond float32, for picture 4 of 4"),
            ([1, 2, 3, 10**400], "int too large to convert to float"),
        ):
            answers["scores"] = scores
            assert refused().startswith(start) and seen in refused() and refused().endswith(end)


def test_another_reward_behind_the_same_address_is_told_by_what_the_server_says() -> None:
    health: dict[str, Any] = {"rewards": {"deqa": 1}}
    with answering(lambda path, *_: health if path == "/health" else (404, {})) as url:
        seen = [load_rewards([f"far={url}=0.5"]).contents for _ in range(2)]
        health["queue"] = 3  # changes all the time
        seen.append(load_rewards([url]).contents)
        assert seen[0] == seen[1] == seen[2] and list(seen[0]) == [f"content of {url}"]
        for change in ({"rewards": {"deqa": 2}}, {"rewards": {"ocr": 1}}, {"fingerprints": {"deqa": "another"}}):
            health.update(change)
            seen.append(load_rewards([url]).contents)
    assert len({str(one) for one in seen[2:]}) == 4


WRONG_ANSWERS = {
    "no scores": ({}, "an answer without scores: {}"),
    "a list": ([0.5, 0.5], "an answer without scores: [0.5, 0.5]"),
    "too few": ({"scores": [0.5]}, "scores: 1 numbers for 2 pictures"),
    "too many": ({"scores": [0.5] * 3}, "scores: 3 numbers for 2 pictures"),
    "words": ({"scores": ["0.5", "0.5"]}, "scores: no numbers: ['0.5', '0.5']"),
    "booleans": ({"scores": [True, False]}, "scores: no numbers: [True, False]"),
    "nulls": ({"scores": [None, 1]}, "scores: no numbers: [None, 1]"),
    "NaN": (b'{"scores": [NaN, 1]}', "answers with something that is not JSON"),
    "infinite": (b'{"scores": [1e999, 1]}', "returned infinity, or a number beyond float32, for picture 1 of 2"),
    "beyond float": (b'{"scores": [1' + b"0" * 400 + b", 1]}", "OverflowError"),
    "parts": ({"scores": [1, 2], "parts": [1]}, '"parts" is no object'),
    "a part too long": ({"scores": [1, 2], "parts": {"a": [1, 2, 3]}}, "part 'a': 3 numbers for 2 pictures"),
    "oversized": (b" " * (16 * 2**20 + 1), "answers with more than 16777216 bytes"),
    "no JSON": (b"<html>", "answers with something that is not JSON"),
    "failed": ((500, {"error": "out of memory"}), "out of memory"),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_a_wrong_answer_costs_its_group_and_never_scores_0(kind: str) -> None:
    content, expected = WRONG_ANSWERS[kind]

    def answer(path: str, body: bytes, _: Any) -> Any:
        return content if json.loads(body)["prompt"] == "two" else {"scores": [1, 2]}

    with answering(answer) as url:
        reward = WeightedReward({"far": RemoteReward(url)}, {"far": 1.0})
        scores = reward.score_groups(np.stack([picture()] * 4), [Prompt("one"), Prompt("two")], 2)
    assert scores.valid.tolist() == [True, False] and np.isnan(scores.rewards[1]).all()
    assert len(scores.failures) == 1 and expected in scores.failures[0] and len(scores.failures[0]) < 300


KEYS = st.sampled_from(["scores", "parts", "queue", "a"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)
NUMBERS = st.lists(st.integers(-(10**40), 10**40) | st.floats(width=32), min_size=1, max_size=3)
ANSWERS = JSON | st.fixed_dictionaries({"scores": NUMBERS}, optional={"queue": JSON, "parts": JSON})


@settings(deadline=None)
@given(ANSWERS)
def test_any_answer_gives_two_finite_scores_or_a_failure(content: Any) -> None:
    reward = RemoteReward("http://127.0.0.1")
    reward._client.post = lambda path, body: Reply(content, 1, 0.1)  # type: ignore[method-assign]
    scores = WeightedReward({"far": reward}, {"far": 1.0}).score_groups(np.stack([picture()] * 2), [Prompt("p")], 2)
    assert np.isfinite(scores.rewards).all() if scores.valid[0] else len(scores.failures) == 1
    if scores.valid[0]:
        assert scores.rewards[0].tolist() == [pytest.approx(value) for value in content["scores"]]


# What it refuses


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def saved(kind: str, mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


REFUSED = {
    "no JSON": (b"hello", 400, "no JSON: Expecting value"),
    "not UTF-8": (b"\xff\xfe{}", 400, "no JSON: "),
    "NaN": (b'{"prompt": "p", "metadata": {"a": NaN}, "images": []}', 400, "no JSON: NaN is no JSON"),
    "deep": (b"[" * 100_000, 400, "no JSON: "),
    "a list": ([], 400, "no JSON object"),
    "no prompt": ({"images": [as_text(picture())]}, 400, "a prompt is a text with an object of metadata"),
    "prompt of another type": (request(prompt=3), 400, "a prompt is a text with an object of metadata"),
    "metadata of another type": (request(metadata=[]), 400, "a prompt is a text with an object of metadata"),
    "no images": (request(images=[]), 400, '"images" is no list of PNG files in base64'),
    "images of another type": (request(images=["", 3]), 400, '"images" is no list of PNG files in base64'),
    "no base64": (request(images=["!!!"]), 400, "image 0: "),
    "no PNG": (request(images=["AAAA"]), 400, "image 0: no PNG"),
    "a JPEG": (request(images=[saved("JPEG")]), 400, "image 0: no PNG"),
    "with alpha": (request(images=[saved("PNG", "RGBA")]), 400, "image 0: a PNG of mode RGBA, not of 8-bit RGB"),
    "16 bits": (request(images=[saved("PNG", "I;16")]), 400, "image 0: a PNG of mode I;16, not of 8-bit RGB"),
    "cut short": (request(images=[as_text(picture(size=64))[:80]]), 400, "image 0: no readable PNG ("),
    "sizes": (request(images=[as_text(picture()), as_text(picture(size=9))]), 400, "the images differ in size"),
    "too many": (request(images=[as_text(picture())] * 9), 413, "9 images, more than --max-images 8"),
    "too large": (
        request(images=[base64.b64encode(bomb(50_000, 50_000)).decode()]),
        413,
        "image 0: 50000 × 50000 pixels, more than 1000000 that are left of --max-megapixels 1",
    ),
    "too large together": (request(images=[as_text(picture(size=600))] * 3), 413, "image 2: 600 × 600 pixels, more"),
    "empty picture": (request(images=[base64.b64encode(bomb(0, 5)).decode()]), 400, "image 0: "),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_request_that_cannot_be_scored_is_told_why(server: Process, kind: str) -> None:
    body, status, expected = REFUSED[kind]
    got = post(server, body)
    assert got[0] == status and got[1].startswith(expected), got
    assert serves(server)


def test_addresses_that_are_none(server: Process) -> None:
    assert post(server, request(), "/scores") == (404, "no such address '/scores': there are /health, /score, /check")
    assert post(server, request(), "/../../etc/passwd")[0] == 404
    assert post(server, {"prompts": ["p"]}, "/check") == (400, '"prompts" is no list of objects')
    assert post(server, {}, "/check") == {"queue": 0}


HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\n"
TYPED = HEAD + b"Content-Type: application/json\r\n"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
BAD_HEADS = {
    "garbage": (b"\x00\x01\x02\r\n\r\n", 400, "illegal request line"),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host: header"),
    "no length": (TYPED + b"\r\n{}", 411, "one Content-Length is needed"),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 411, "one Content-Length is needed"),
    "chunked": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411, "one Content-Length is needed"),
    "both": (
        TYPED + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        411,
        "one Content-Length is needed",
    ),
    "another encoding": (TYPED + b"Transfer-Encoding: gzip\r\n\r\n{}", 501, "Only Transfer-Encoding: chunked"),
    "negative": (HEAD + b"Content-Length: -1\r\n\r\n", 400, "bad Content-Length"),
    "no number": (HEAD + b"Content-Length: 1_0\r\n\r\n", 400, "bad Content-Length"),
    "plus": (HEAD + b"Content-Length: +2\r\n\r\n{}", 400, "bad Content-Length"),
    "huge": (HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", 400, "bad Content-Length"),
    "a web page's type": (
        HEAD + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
        415,
        "Content-Type must be application/json",
    ),
    "too long": (TYPED + b"Content-Length: 5000000\r\n\r\n", 413, "5000000 bytes, more than --max-body-mib 4"),
    "ends early": (TYPED + b"Content-Length: 50\r\n\r\n{}", 400, "the request ended early"),
    "ends in its head": (b"GET /health HTTP/1.1\r\nHost:", 400, "the request ended early"),
    "long line": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "first line is too long"),
    "a line without end": (b"GET /" + b"a" * 300_000, 414, "first line is too long"),
    "long header": (GET + b"A: " + b"a" * 70_000 + b"\r\n\r\n", 431, "too many headers, or too long ones"),
    "a header without end": (GET + b"A: " + b"a" * 300_000, 431, "Receive buffer too long"),
    "many headers": (GET + b"A: b\r\n" * 200 + b"\r\n", 431, "too many headers, or too long ones"),
    "another method": (b"DELETE /score HTTP/1.1\r\nHost: a\r\n\r\n", 501, "Unsupported method ('DELETE')"),
    "another version": (b"GET /health HTTP/9.9\r\n\r\n", 505, "Invalid HTTP version (9.9)"),
    "another page": (GET + b"\r\n", 404, "no such address '/': there are /health, /score, /check"),
}


@pytest.mark.parametrize("kind", BAD_HEADS)
def test_heads_that_are_none(server: Process, kind: str) -> None:
    data, status, reason = BAD_HEADS[kind]
    head, _, body = raw(server, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and reason in json.loads(body)["error"], (head, body)
    assert serves(server)


def test_a_body_that_is_too_large_is_refused_with_the_reason(server: Process) -> None:
    assert post(server, b" " * 5_000_000) == (413, "5000000 bytes, more than --max-body-mib 4")
    with pytest.raises(UserError, match=r"9 images, more than --max-images 8"):
        RemoteReward(server.url)(np.stack([picture()] * 9), ["p"] * 9, [{}] * 9)


def test_slow_and_silent_clients_keep_nobody_waiting(server: Process) -> None:
    """Twenty that trickle, twenty that say nothing: others are answered at once."""
    strangers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    for stranger in strangers[:20]:
        stranger.sendall(b"POST /score HT")
    started = time.monotonic()
    assert serves(server) and time.monotonic() - started < 5
    for stranger in strangers:
        stranger.close()


class Canary:
    """Unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_that_is_sent_is_executed(server: Process, tmp_path: Path) -> None:
    path = tmp_path / "executed"
    evil = pickle.dumps(Canary(path))
    pickle.loads(evil)
    assert path.exists(), "it would work"
    path.unlink()
    tag = f"!!python/object/apply:os.system ['touch {path}']"
    code = f"__import__('pathlib').Path({str(path)!r}).touch()"
    for body in (
        evil,
        base64.b64encode(evil),
        tag.encode(),
        request(images=[base64.b64encode(evil).decode()]),
        request(
            prompt=tag, metadata={"__class__": code, "__reduce__": code, "tag": tag, "$(touch)": f"$(touch {path})"}
        ),
        request(prompt=code),
    ):
        post(server, body)
        for kind in (b"application/python-pickle", b"application/octet-stream", b"application/x-yaml"):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            raw(server, HEAD + b"Content-Type: " + kind + b"\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    assert serves(server) and not path.exists()


def to_check(**changes: Any) -> dict[str, Any]:
    return {"prompts": [{"text": "p", "metadata": {}, "origin": "p.txt:1"}], "images": [as_text(picture())], **changes}


def mutated(rng: random.Random, content: dict[str, Any]) -> bytes:
    """A body with damage: bytes of its picture or of its JSON changed, its end cut off, or a value of another kind."""
    kind = rng.randrange(4)
    if kind == 0:
        damaged = bytearray(png.encode_png(picture()))
        for _ in range(rng.randrange(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return json.dumps({**content, "images": [base64.b64encode(damaged).decode()]}).encode()
    if kind == 1:
        values: list[Any] = [None, True, -1, 1e308, "", "a", [], {}, [[]], [{"a": {}}], [None] * 9, "9" * 50]
        return json.dumps({**content, rng.choice([*content, "more"]): rng.choice(values)}).encode()
    body = bytearray(json.dumps(content).encode())
    if kind == 2:
        return bytes(body[: rng.randrange(len(body))])
    for _ in range(rng.randrange(1, 8)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


def is_well_formed(path: str, body: bytes) -> bool:
    """Whether a body is a request after all, by Python's JSON and Pillow: damage may only change a text."""
    try:
        content = json.loads(body, parse_constant=json.loads)  # NaN is no JSON
        listed = content.get("prompts", []) if path == "/check" else [{**content, "text": content["prompt"]}]
        fields = [(one["text"], one.get("metadata", {}), one.get("origin", "")) for one in listed]
        if not isinstance(listed, list) or any(tuple(map(type, one)) != (str, dict, str) for one in fields):
            return False
        if path == "/check" and "images" not in content:
            return True
        encoded = content["images"]
        opened = [Image.open(io.BytesIO(base64.b64decode(one, validate=True))) for one in encoded]
        shapes = {np.asarray(one).shape if one.mode == "RGB" else None for one in opened}
        return isinstance(encoded, list) and len(shapes) == 1 and None not in shapes
    except Exception:  # whatever they object to
        return False


ANY_4XX = range(400, 499)
UNREADABLE = (*ANY_4XX, 499, 501, 505, 0)  # 499: the client has gone, for all that the server can see


def drawn(rng: random.Random, token: str | None) -> tuple[bytes, Sequence[int]]:
    """A request that is wrong in its method, address, token, head or body, and the statuses that say so; 0: none.

    Where nothing is wrong with it after all, the status is 200.
    """
    path, content = rng.choice([("/score", request(prompt=rng.choice(["p", "\0", "😀"]))), ("/check", to_check())])
    body, method, statuses = mutated(rng, content), "POST", ANY_4XX
    kind = rng.choice(["method", "address", "token", "head", *["body"] * 12])
    if kind == "method":
        method, body, statuses = rng.choice(["PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"]), b"", [501]
    elif kind == "address":
        gets = [("GET", "/"), ("GET", path), ("GET", "/health/"), ("GET", "/../health?a=b")]
        method, path = rng.choice([*gets, ("POST", "/health"), ("POST", "/"), ("POST", f"{path}/")])
        body, statuses = body if method == "POST" else b"", [404]
    elif kind == "token" and token:
        token, statuses = rng.choice([None, f"{token}x", token[:-1], "ü"]), [401]
    elif is_well_formed(path, body):
        body, statuses = (body[:-1], ANY_4XX) if kind == "head" else (body, [200])
    lines = [f"{method} {path} HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    head = bytearray("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if kind == "head":
        statuses = UNREADABLE
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(head))
            head[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(head + body), statuses


def status_of(port: int, data: bytes, hang_up: bool) -> int:
    """Status of the answer; 0 where the connection is closed without one. A timeout, neither of the two, is raised."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(data)
            if hang_up:
                connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(64)
        except ConnectionError:  # closed before all was sent
            return 0
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0


def test_10000_malformed_requests_leave_it_serving(
    server: Process, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a token, each is refused by the status of what is wrong with it, the client's fault, and
    damage that harms nothing is answered. Both servers go on scoring, and have nothing to say about them."""

    def attack(seed: int, port: int, token: str | None) -> None:
        rng, malformed = random.Random(seed), 0
        while malformed < 2500:
            data, statuses = drawn(rng, token)
            # Where a head may promise more than there is, the server would wait for it.
            status = status_of(port, data, hang_up=statuses is UNREADABLE)
            assert status in statuses, (status, data)
            malformed += statuses != [200]

    with reward_server("--reward", "jpeg", "--token-file", "token.txt", folder=folder) as guarded:
        targets = [(server.port, None), (server.port, None), (server.port, None), (guarded.port, TOKEN)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(attack, range(4), *zip(*targets, strict=True)))
        assert serves(server)
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        assert load_rewards([guarded.url]).score_groups(picture()[None], [Prompt("p")], 1).valid.all()
        status, _, errors = guarded.stop()
        assert (status, errors) == (0, "")


# How it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_on_a_signal_and_finishes_what_it_scores(folder: Path, number: int) -> None:
    """The running request is answered, the one behind it turned away, and the exit status is 0."""
    with reward_server("--reward", "own:Slow", folder=folder) as server:
        answers: dict[str, Any] = {}

        def ask(name: str, seconds: float) -> None:
            answers[name] = post(server, request(metadata={"seconds": seconds}))

        threads = [threading.Thread(target=ask, args=("running", 1.0))]
        threads[0].start()
        client = JsonClient(server.url)
        wait_for(lambda: client.get("/health").content["queue"] == 1)
        threads.append(threading.Thread(target=ask, args=("waiting", 0.0)))
        threads[1].start()
        wait_for(lambda: client.get("/health").content["queue"] == 2)
        status, output, errors = server.stop(number)
        for thread in threads:
            thread.join()
    assert answers["running"]["scores"] == [100]
    assert answers["waiting"][0] == 503
    assert status == 0 and errors == ""
    assert output.splitlines()[-1] == "1 requests scored (1 images), 0 failed, 1 refused"


def test_clients_that_have_gone_are_not_scored(folder: Path) -> None:
    with reward_server("--reward", "own:Slow", folder=folder) as server:
        running = threading.Thread(target=post, args=(server, request(metadata={"seconds": 1.0})))
        running.start()
        client = JsonClient(server.url)
        wait_for(lambda: client.get("/health").content["queue"] == 1)
        for _ in range(5):
            with pytest.raises(Unanswered):
                JsonClient(server.url, deadline_s=0.1).post("/score", json.dumps(request()).encode())
        running.join()
        wait_for(lambda: client.get("/health").content["queue"] == 0)
        assert client.get("/health").content["scored"] == 1


def test_what_takes_too_long_is_said_so(folder: Path) -> None:
    with reward_server("--reward", "own:Slow", "--deadline-s", "0.3", folder=folder) as server:
        assert post(server, request(metadata={"seconds": 1.0}))[0] == 504
        wait_for(lambda: JsonClient(server.url).get("/health").content["scored"] == 1)
        assert serves(server)


def test_a_reward_that_hangs_ends_the_server_in_one_line(folder: Path) -> None:
    """Whatever started it can then start it again; its clients ask again meanwhile."""
    with reward_server("--reward", "own:Slow", "--deadline-s", "0.1", folder=folder) as server:
        assert post(server, request(metadata={"seconds": 600.0}))[0] == 504
        wait_for(lambda: server.process.poll() is not None)
        status, _, error = server.stop()
    assert status == 2 and error.startswith("error: the reward has been at one request for") and error.count("\n") == 1


def test_the_documented_server_of_ones_own_is_one(tmp_path: Path) -> None:
    """The server in docs/rewards.md, as a process that cannot import this package."""
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(import base64, io, json\n.*?)```", page, re.DOTALL)
    assert block
    port = free_port()
    (tmp_path / "server.py").write_text(block[1].replace('("127.0.0.1", 8000)', f'("127.0.0.1", {port})'))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, "-I", "server.py"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        reward = load_rewards([f"mine=http://127.0.0.1:{port}"])
        reward.check_prompts([Prompt("p")])
        red = np.zeros((2, 8, 8, 3), np.uint8)
        red[1, ..., 0] = 255
        scores = reward.score_groups(red, [Prompt("red")], 2)
    finally:
        process.kill()
        process.wait()
    assert scores.rewards.tolist() == [[0, 1]] and not scores.failures


def test_the_client_is_light() -> None:
    """Its module brings neither torch nor the server."""
    code = (
        "import sys, dgpo_fast.rewards.remote.client, dgpo_fast.rewards.remote.judge; "
        "assert not {'torch', 'transformers', 'dgpo_fast.reward_server'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
