"""Judges over HTTP: what is sent, how answers are read, settings, and what happens when a judge is of no use."""

import base64
import dataclasses
import json
import math
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import golden, load_rewards
from dgpo_fast.rewards.remote import http_client, png
from dgpo_fast.rewards.remote.judge import PRESETS, JudgeReward, JudgeSettings
from tests.servers import answering, free_port

LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_FIRST_WAIT_S", 0.01)


def completion(text: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, **more}]}


def sees(path: str, body: bytes, _: Any) -> Any:
    """A judge with eyes: 4.5 where the caption names the colour of the square, else 1.5."""
    picture, question = asked(body)
    red, _, blue = picture[128, 128].astype(int)
    color = "red" if red > blue else "blue"
    return completion(f"Reasoning.\nFinal Score: {4.5 if f'a {color} square' in question else 1.5}")


def asked(body: bytes) -> tuple[np.ndarray, str]:
    """The picture and the question of a request, which must be OpenAI's."""
    content = json.loads(body)["messages"][0]["content"]
    parts = {part["type"]: part for part in content}
    url = parts["image_url"]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return png.decode_png(base64.b64decode(url.split(",")[1]), 10**6), parts["text"]["text"]


def judge(url: str, **settings: Any) -> JudgeReward:
    defaults: dict[str, Any] = {"model": "m", "prompt": "Rate: {prompt}", "score": r"Score: (\S+)", "attempts": 1}
    return JudgeReward(JudgeSettings(url=url, **(defaults | settings)))


def ask(reward: JudgeReward, count: int = 1) -> list[float]:
    return reward(np.zeros((count, 8, 8, 3), np.uint8), ["p"] * count, [{}] * count)[0].tolist()


def test_what_is_sent_and_what_comes_back() -> None:
    bodies = []

    def answer(path: str, body: bytes, handler: Any) -> Any:
        bodies.append((path, json.loads(body), asked(body)))
        return completion("Score: 3.5")

    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with answering(answer) as url:
        reward = judge(f"{url}/v1", extra='{"seed": 7}', max_tokens=None)
        scores, parts = reward(image[None], ["a {prompt} of 'Score: 5'"], [{}])
    path, request, (picture, question) = bodies[0]
    assert path == "/v1/chat/completions" and (picture == image).all()
    assert question == "Rate: a {prompt} of 'Score: 5'"
    assert request["model"] == "m" and request["seed"] == 7 and request["temperature"] == 0
    assert "max_tokens" not in request and "logprobs" not in request
    assert scores.dtype == np.float32 and scores.tolist() == [pytest.approx(0.7)]
    assert parts["raw"].tolist() == [3.5] and parts["attempts"].tolist() == [1] and parts["latency_s"][0] > 0


def test_order_and_size_of_the_picture() -> None:
    seen = []

    def answer(path: str, body: bytes, _: Any) -> Any:
        kinds = [part["type"] for part in json.loads(body)["messages"][0]["content"]]
        seen.append((kinds, asked(body)[0].shape))
        return completion("Score: 1")

    images = np.zeros((1, 64, 32, 3), np.uint8)
    with answering(answer) as url:
        judge(url, image_size=16)(images, ["p"], [{}])
        judge(url, image_first=False, image_size=64)(images, ["p"], [{}])
    assert seen == [(["image_url", "text"], (16, 8, 3)), (["text", "image_url"], (64, 32, 3))]


@pytest.mark.parametrize(
    ("text", "score"), [("Score: 4", 4), ("The Score: 2 or so. Score: 3.25", 3.25), ("Score: 1.0\n", 1)]
)
def test_the_last_score_in_the_answer_counts(text: str, score: float) -> None:
    with answering(lambda *_: completion(text)) as url:
        assert ask(judge(url, divisor=1)) == [score]


BAD_ANSWERS = {
    "no score": (completion("I cannot say."), "no score in the answer 'I cannot say.'"),
    "words": (completion("Score: high"), "could not convert string to float: 'high'"),
    "beyond": (completion("Score: 7"), "score 7 outside 1 to 5"),
    "below": (completion("Score: 0"), "score 0 outside 1 to 5"),
    "nan": (completion("Score: nan"), "score nan outside 1 to 5"),
    "infinite": (completion("Score: 1e999"), "score inf outside 1 to 5"),
    "cut": (completion("Score: 4.", finish_reason="length"), "an answer cut at max_tokens 512: 'Score: 4.'"),
    "no text": (completion(None), "an answer without text"),
    "a list": (completion([{"type": "text"}]), "an answer without text"),
    "no choices": ({"choices": []}, "no chat completion: {'choices': []}"),
    "something else": ([1], "no chat completion: [1]"),
    "nothing": (None, "no chat completion: None"),
    "no JSON": (b"hello", "answers with something that is not JSON"),
    "refused": ((400, {"error": {"message": "content policy"}}), "content policy"),
    "gone": ((503, {}), "status 503"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_an_answer_of_no_use_fails_its_group_and_never_scores_0(kind: str) -> None:
    content, expected = BAD_ANSWERS[kind]

    def answer(path: str, body: bytes, _: Any) -> Any:
        if content is None:
            return b"null"
        return content if asked(body)[1] == "Rate: two" else completion("Score: 5")

    with answering(answer) as url:
        from dgpo_fast.rewards import WeightedReward

        reward = WeightedReward({"judge": judge(url)}, {"judge": 1.0})
        prompts = [Prompt("one"), Prompt("two")]
        scores = reward.score_groups(np.zeros((4, 8, 8, 3), np.uint8), prompts, 2)
    lost = [0, 1] if content is None else [1]
    assert [index for index in range(2) if not scores.valid[index]] == lost
    assert np.isnan(scores.rewards[1]).all() and len(scores.failures) == len(lost)
    assert expected in scores.failures[-1] and "prompt 'two'" in scores.failures[-1]


@pytest.mark.parametrize(
    ("status", "settings", "expected"),
    [
        (401, {}, "judge 'm': it wants a key: set api_key_variable"),
        (403, {"api_key_variable": "KEY"}, "judge 'm': the key in KEY is refused"),
        (404, {}, "judge 'm': URL has no such model or address"),
    ],
)
def test_a_wrong_setup_is_said_so(status: int, settings: dict, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk-secret")
    with answering(lambda *_: (status, {"error": "no: sk-secret"})) as url:
        with pytest.raises(UserError) as caught:
            ask(judge(url, **settings))
        assert str(caught.value) == expected.replace("URL", url)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    seen = []

    def answer(path: str, body: bytes, handler: Any) -> Any:
        seen.append(handler.headers["Authorization"])
        return completion("Score: 1")

    with answering(answer) as url:
        ask(judge(url, api_key_variable="MY_KEY"))
    assert seen == ["Bearer sk-secret"]
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="the environment variable MY_KEY is not set"):
        judge("http://127.0.0.1", api_key_variable="MY_KEY")


def test_a_judge_scores_each_picture_on_its_own() -> None:
    """Nine pictures, four at a time and the first the slowest: each gets the score that it gets alone."""

    def answer(path: str, body: bytes, _: Any) -> Any:
        value = int(asked(body)[0].max())
        time.sleep((9 - value) / 100)
        return completion(f"Score: {1 + value / 4}")

    images = np.repeat(np.arange(9, dtype=np.uint8), 8 * 8 * 3).reshape(9, 8, 8, 3)
    with answering(answer) as url:
        reward = judge(url, requests_at_once=4)
        together, parts = reward(images, ["p"] * 9, [{}] * 9)
        alone = [reward(images[i : i + 1], ["p"], [{}])[0][0] for i in range(9)]
    assert together.tolist() == alone and parts["raw"].tolist() == [1 + i / 4 for i in range(9)]


def test_pictures_are_judged_together_but_not_too_many() -> None:
    together, lock, running = threading.Barrier(4, timeout=20), threading.Lock(), [0, 0]

    def answer(path: str, body: bytes, _: Any) -> Any:
        with lock:
            running[0] += 1
            running[1] = max(running)
        together.wait()
        with lock:
            running[0] -= 1
        return completion("Score: 2")

    with answering(answer) as url:
        assert ask(judge(url, requests_at_once=4), 8) == [pytest.approx(0.4)] * 8
    assert running[1] == 4


def token(word: str, **chances: float) -> dict[str, Any]:
    top = [{"token": f" {name}", "logprob": math.log(chance)} for name, chance in chances.items()]
    return {"token": word, "logprob": -0.1, "top_logprobs": top}


def test_levels_are_weighed_by_their_probabilities() -> None:
    """As DeQA-Score reads its answer, by hand: (0.5 · 4 + 0.3 · 5 + 0.1 · 3) / 0.9 = 4.2222."""
    words = [token("The", The=1), token(" image", image=1), token(" is", good=1)]
    words += [token(" good", good=0.5, excellent=0.3, fair=0.1, nice=0.1), token(".", bad=1)]
    bodies = []

    def answer(path: str, body: bytes, _: Any) -> Any:
        bodies.append(json.loads(body))
        return completion("The image is good.", logprobs={"content": words})

    with answering(answer) as url:
        score = ask(judge(url, score=None, levels=LEVELS))
    assert score == [pytest.approx(3.8 / 0.9 / 5)]
    assert bodies[0]["logprobs"] is True and bodies[0]["top_logprobs"] == 20


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        (None, "an answer without probabilities: the server must support logprobs"),
        ({"content": None}, "an answer without probabilities: the server must support logprobs"),
        ({"content": [token("nice", nice=1)]}, "none of excellent, good, fair, poor, bad in the answer 'nice'"),
        ({"content": [token("good", nice=1)]}, "the levels have no probability"),
    ],
)
def test_levels_that_are_missing(logprobs: Any, expected: str) -> None:
    with (
        answering(lambda *_: completion("nice", logprobs=logprobs)) as url,
        pytest.raises(ValueError, match=f"^{re.escape(expected)}$"),
    ):
        ask(judge(url, score=None, levels=LEVELS))


# Settings


def write(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump(settings) if path.suffix == ".yaml" else json.dumps(settings))
    return str(path)


def message(path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_rewards([path])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["judge.yaml", "judge.json"])
def test_a_judge_by_its_file(tmp_path: Path, name: str) -> None:
    with answering(sees) as url:
        path = write(tmp_path / name, preset="unifiedreward", url=f"{url}/v1", model="UnifiedReward")
        reward = load_rewards([f"taste={path}=2"])
        images = golden.squares()[[0, 2]]
        scores = reward.score_groups(images, [Prompt("a red square")], 2)
    np.testing.assert_allclose(scores.rewards, [[2 * 0.9, 2 * 0.3]], rtol=1e-6)
    assert set(scores.parts) == {"taste", "taste/raw", "taste/latency_s", "taste/attempts"}


def test_presets_hold_what_is_known_of_the_models() -> None:
    """UnifiedReward: a score from 1 to 5 after `Final Score:`, at 512 pixels; DeQA: five words; both divided by 5."""
    assert set(PRESETS) == {"unifiedreward", "deqa"}
    for preset in PRESETS.values():
        settings = JudgeSettings(**preset)
        assert (settings.lowest, settings.highest, settings.divisor) == (1, 5, 5)
    assert PRESETS["unifiedreward"]["image_size"] == 512 and PRESETS["deqa"]["levels"] == LEVELS
    pattern = PRESETS["unifiedreward"]["score"]
    for text in ("Final Score: 4.5", "**Final Score:** 4.5", "… Final Score:\n4.5/5"):
        assert re.findall(pattern, text) == ["4.5"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "url is missing: a judge needs url, model and prompt"),
        ({"url": "http://a", "prompt": "p"}, "model is missing: a judge needs url, model and prompt"),
        ({"url": "http://a", "model": "m"}, "prompt is missing: a judge needs url, model and prompt"),
        ({"promt": "p"}, "unknown setting 'promt': did you mean 'prompt'?"),
        ({"preset": "clip"}, "preset: input should be 'unifiedreward' or 'deqa', not 'clip'"),
        ({"preset": ["deqa"]}, "preset: input should be 'unifiedreward' or 'deqa', not ['deqa']"),
        ({"divisor": 0}, "divisor: input should be greater than 0, not 0"),
        ({"preset": "unifiedreward", "url": "a", "model": "m"}, "address 'a': write http://host:port"),
        ({"url": "http://a", "model": "m", "prompt": "p"}, "give either score, a regular expression, or levels"),
        ({"url": "http://a", "model": "m", "prompt": "p", "score": "("}, "score: no regular expression ("),
        ({"url": "http://a", "model": "m", "prompt": "p", "score": "a"}, "score: needs one group in brackets"),
        ({"url": "http://a", "model": "m", "prompt": "p", "score": "(a)"}, "prompt lacks {prompt}, so captions"),
        ({"url": "http://a", "model": "m", "prompt": "p", "levels": {"Good ": 1}}, "levels: write words in lower case"),
        ({"preset": "deqa", "url": "http://a", "model": "m", "extra": "[]"}, "extra: no JSON object"),
        ({"preset": "deqa", "url": "http://a", "model": "m", "extra": "{"}, "extra: no JSON ("),
        ({"preset": "deqa", "url": "http://a", "model": "m", "api_key_variable": "NO_KEY"}, "the environment variable"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict, expected: str) -> None:
    path = write(tmp_path / "judge.yaml", **settings)
    assert message(path).startswith(f"{path}: {expected}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert message(str(tmp_path / "none.yaml")) == (
        f"{tmp_path / 'none.yaml'}: no such file: check the path (the working folder is {Path.cwd()})"
    )


def test_the_documented_judges_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files in docs/rewards.md, and the table of settings beside them."""
    monkeypatch.setenv("EXAMPLE_API_KEY", "sk-1")
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    files = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(files) == 2
    for file in files:
        (tmp_path / "judge.yaml").write_text(file)
        JudgeReward.from_file(tmp_path / "judge.yaml")
    table = page[page.index("| setting | meaning | default |") :].split("\n\n")[0]
    named = {
        name for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named | {"preset"} == {field.name for field in dataclasses.fields(JudgeSettings)}


# Self-tests


def test_a_judge_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    path = write(tmp_path / "judge.yaml", preset="unifiedreward", url=url, model="m", attempts=2)
    assert message(path).startswith(f"judge 'm' at {url} failed its self-test: {url}: Connection refused")


def answer_backwards(path: str, body: bytes, handler: Any) -> Any:
    """A judge that takes red for blue."""
    text = sees(path, body, handler)["choices"][0]["message"]["content"]
    return completion(text.replace("4.5", "?").replace("1.5", "4.5").replace("?", "1.5"))


def sees_noise(path: str, body: bytes, _: Any) -> Any:
    """A judge of quality: good, and bad where neighbouring pixels have little to do with one another."""
    picture, _ = asked(body)
    return quality("bad" if np.abs(np.diff(picture.astype(int), axis=0)).mean() > 40 else "excellent")


def quality(word: str) -> dict[str, Any]:
    return completion(f"The quality is {word}.", logprobs={"content": [token(word, **{word: 1.0})]})


def likes_noise(path: str, body: bytes, handler: Any) -> Any:
    text = sees_noise(path, body, handler)["choices"][0]["message"]["content"]
    return quality("bad" if "excellent" in text else "excellent")


PNG = "a red square does not survive its PNG"
CAPTIONS = "squares score 0.300 with their own captions and 0.900 with wrong ones: wrong model or prompt?"
WRONG_JUDGES = {
    ("unifiedreward", "wrong model"): (answer_backwards, CAPTIONS),
    ("unifiedreward", "no score"): (lambda *_: completion("Nice."), "no score in the answer 'Nice.'"),
    ("unifiedreward", "swapped channels"): (sees, PNG),
    ("unifiedreward", "wrong range"): (sees, PNG),
    ("deqa", "wrong model"): (likes_noise, "a photograph scores 0.200 and noise 1.000: wrong model or prompt?"),
    ("deqa", "one answer"): (
        lambda *_: quality("good"),
        "a photograph scores 0.800 and noise 0.800: wrong model or prompt?",
    ),
    ("deqa", "no score"): (
        lambda *_: completion("Nice."),
        "an answer without probabilities: the server must support logprobs",
    ),
    ("deqa", "swapped channels"): (sees_noise, PNG),
    ("deqa", "wrong range"): (sees_noise, PNG),
}


@pytest.mark.parametrize(("preset", "kind"), WRONG_JUDGES)
def test_the_self_test_fails_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, kind: str) -> None:
    """Of either preset; `test_a_judge_by_its_file` and the test below show that right judges pass."""
    answer, seen = WRONG_JUDGES[preset, kind]
    original = png.encode_png
    changes = {"swapped channels": lambda image: image[..., ::-1], "wrong range": lambda image: image // 255}
    if kind in changes:
        change = changes[kind]
        monkeypatch.setattr(png, "encode_png", lambda image: original(np.ascontiguousarray(change(image))))
    with answering(answer) as url:
        path = write(tmp_path / "judge.yaml", preset=preset, url=url, model="m")
        where = "" if seen is PNG else f" at {url}"
        assert message(path) == f"judge 'm'{where} failed its self-test: {seen}"


def test_a_judge_of_quality_prefers_a_photograph_to_noise(tmp_path: Path) -> None:
    with answering(sees_noise) as url:
        load_rewards([write(tmp_path / "judge.yaml", preset="deqa", url=url, model="deqa")])


def test_a_judge_may_be_asked_for_any_answer_at_the_start(tmp_path: Path) -> None:
    with answering(lambda *_: completion("Score: 3")) as url:
        settings = {"url": url, "model": "m", "prompt": "Is it nice?", "score": r"Score: (\d)", "self_test": "answer"}
        load_rewards([write(tmp_path / "judge.yaml", **settings)])


def test_no_images(tmp_path: Path) -> None:
    scores, parts = judge("http://127.0.0.1")(np.zeros((0, 8, 8, 3), np.uint8), [], [])
    assert scores.shape == (0,) and parts == {}


def test_another_judge_of_the_same_file_is_told_by_its_settings() -> None:
    """Each setting that decides a score makes another fingerprint; those of how the judge is reached do not."""
    first = judge("http://127.0.0.1:1").fingerprint
    reached = {"deadline_s": 1.0, "attempts": 3, "requests_at_once": 2, "self_test": "answer"}
    assert judge("http://127.0.0.1:2", **reached).fingerprint == first
    other: list[dict[str, Any]] = [
        {"model": "n"},
        {"prompt": "Rate it: {prompt}"},
        {"score": r"Rating: (\S+)"},
        {"divisor": 10.0},
        {"image_size": 512},
        {"temperature": 1.0},
        {"extra": '{"seed": 1}'},
        {"image_first": False},
    ]
    found = {judge("http://127.0.0.1:1", **settings).fingerprint for settings in other}
    assert len(found) == len(other) and first not in found
