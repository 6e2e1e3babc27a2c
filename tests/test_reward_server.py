"""The reward server as a process: what it scores, whom it answers, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgpo_fast.config.command_line import run_command
from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import load_rewards
from dgpo_fast.rewards.remote.client import TOKEN_VARIABLE, RemoteReward
from dgpo_fast.rewards.remote.http_client import JsonClient, Unanswered
from dgpo_fast.rewards.serving.server import serve
from tests.servers import (
    TOKEN,
    Process,
    as_text,
    limited_server,
    own_rewards,
    picture,
    post,
    raw,
    request,
    reward_server,
    serves,
    wait_for,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_rewards(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with limited_server(folder) as running:
        yield running


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
