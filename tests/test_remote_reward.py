"""A reward on a server: how the server is tried out, and what its answers may be."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import WeightedReward, golden, load_rewards
from dgpo_fast.rewards.remote import png
from dgpo_fast.rewards.remote.client import RemoteReward
from dgpo_fast.rewards.remote.http_client import Reply
from tests.servers import Process, answering, free_port, limited_server, own_rewards, picture, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_rewards(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with limited_server(folder) as running:
        yield running


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
