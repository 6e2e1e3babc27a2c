"""Rewards inside whole runs on the shipped pipeline: chosen per prompt, failing, and gone."""

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure, run_command
from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.registry import load_reward
from dgpo_fast.rewards.remote import http_client
from dgpo_fast.rewards.remote.client import TOKEN_VARIABLE, RemoteReward
from dgpo_fast.rollout.online import OnlineSource
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.tiny import data
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.servers import Process, answering, free_port, reward_server, wait_for

# A run of four pictures an iteration that takes about a second.
SMALL = [
    "--name=run",
    "--iterations=3",
    "--rollout.groups=4",
    "--rollout.group-size=2",
    "--rollout.num-inference-steps=2",
    "--dgpo.timesteps=1",
    "--dgpo.high-noise-steps=2",
    "--evaluation.images=8",
    "--evaluation.num-inference-steps=2",
]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_mixed_prompts(path: Path) -> None:
    shapes = [{**metadata, "reward": "shapes"} for _, metadata in data.shape_prompts("train")[:20]]
    signs = [{**metadata, "reward": "ocr"} for _, metadata in data.sign_prompts("train")[:20]]
    path.write_text("\n".join(map(json.dumps, shapes + signs)))


def test_a_mixed_run_of_shapes_and_signs(workspace: Path) -> None:
    """Each prompt is scored by the reward that its metadata names, and each reward has a mean of its own."""
    write_mixed_prompts(workspace / "mixed.jsonl")
    assert train(["--prompts", "mixed.jsonl", "--rewards", "shapes", "ocr=0.5", *SMALL]) == 0
    lines = read_metrics(workspace / "runs/run/metrics.jsonl")
    assert all(line["groups_dropped_count"] == 0 for line in lines)
    for name in ("shapes", "ocr"):
        assert any(line[f"reward/{name}_mean"] is not None for line in lines), name
    summary = json.loads((workspace / "runs/run/summary.json").read_text())
    assert summary["after"]["images"] == 8 and "ocr" in summary["after"]["tags"]


def test_rewards_of_prompts_are_spread_over_processes(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    """Whatever order prompts were dealt in, each half of an iteration's groups has its half of each reward's."""
    dealt = [Prompt(str(number), {"reward": "ocr" if number < 4 else "shapes"}) for number in range(8)]
    write_mixed_prompts(workspace / "mixed.jsonl")
    settings = ["tiny-shapes", "--prompts", "mixed.jsonl", "--rewards", "shapes", "ocr", "--evaluation.images", "8"]
    drawn: list[list[Prompt]] = []
    trainer = Trainer(build(configure(settings)))
    source = cast(OnlineSource, trainer.source)
    monkeypatch.setattr(source.prompts, "draw", lambda iteration: dealt)
    monkeypatch.setattr(source.worker, "draw_groups", lambda prompts, *args, **options: drawn.append(prompts))
    source.collect(0)
    trainer.close()
    assert sorted(drawn[0], key=dealt.index) == dealt
    for half in (drawn[0][:4], drawn[0][4:]):
        assert [prompt.metadata["reward"] for prompt in half].count("ocr") == 2


def test_an_unknown_choice_is_refused_before_the_run(workspace: Path) -> None:
    (workspace / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "reward": "ocr"}\n')
    with pytest.raises(UserError, match=r"^p\.jsonl:2: no reward 'ocr' in this run: use jpeg, or add it to --rewards$"):
        train(["--prompts", "p.jsonl", "--rewards", "jpeg", *SMALL])
    assert not (workspace / "runs").exists()


# The reward server under fire


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_FIRST_WAIT_S", 0.02)


def lines(workspace: Path) -> list[dict[str, Any]]:
    return read_metrics(workspace / "runs/run/metrics.jsonl")


def in_background(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def iterations_done(workspace: Path) -> int:
    path = workspace / "runs/run/metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


SLOW = """
import time
from dgpo_fast.rewards.registry import load_reward

class Slow:
    "The reward `shapes`, which takes its time, and as much as the metadata say."
    def __init__(self):
        self.shapes = load_reward("shapes", "shapes")
    def __call__(self, images, prompts, metadata):
        time.sleep(metadata[0].get("seconds", 0.05))
        return self.shapes(images, prompts, metadata)
"""


@pytest.fixture
def slow_server(workspace: Path) -> Iterator[Process]:
    """A server of shapes that takes 0.05 s for a group, or what the metadata say under "seconds"."""
    (workspace / "slow.py").write_text(SLOW)
    with reward_server("--reward", "shapes=slow:Slow", folder=workspace) as server:
        yield server


def test_a_run_on_a_reward_server(workspace: Path, slow_server: Process) -> None:
    """Scores, parts and the queue are in every line of the run's metrics: it sends faster than the reward scores."""
    assert train(["--rewards", f"far={slow_server.url}", *SMALL]) == 0
    found = lines(workspace)
    assert len(found) == 3
    for line in found:
        assert line["groups_dropped_count"] == 0
        assert line["reward_mean"] == pytest.approx(line["reward/far_mean"])
        assert line["reward/far/shapes_mean"] == pytest.approx(line["reward/far_mean"])
        assert line["reward/far/queue_mean"] > 0 and line["reward/far/latency_s_mean"] > 0.05
        assert line["reward/far/attempts_mean"] == 1


def test_64_other_clients_change_nothing_for_a_run_but_its_time(workspace: Path, slow_server: Process) -> None:
    """A run in the queue with 64 clients ends with the scores of an undisturbed one, and they get theirs."""
    # Chosen here, not by measurements that 64 neighbours disturb: both runs are to compute the same.
    settings = [
        "--rewards",
        f"far={slow_server.url}",
        *SMALL,
        "--engine.attention=native",
        "--engine.linear=torch",
        "--iterations=2",
        "--evaluation.images=4",
    ]
    assert train([*settings, "--name=alone"]) == 0
    prompt = Prompt(*data.shape_prompts("train")[0])
    pictures = np.random.default_rng(0).integers(0, 256, (64, 1, 32, 32, 3), dtype=np.uint8)
    wanted = [load_reward("shapes", "shapes")(one, [prompt.text], [prompt.metadata])[0][0] for one in pictures]
    is_over = threading.Event()

    def ask(number: int) -> int:
        """Asks until the run is over; how often."""
        reward, metadata = RemoteReward(slow_server.url), [{**prompt.metadata, "seconds": 0.002}]
        for count in itertools.count():
            if is_over.is_set():
                return count
            scores, parts = reward(pictures[number], [prompt.text], metadata)
            assert scores[0] == wanted[number] and parts["attempts"][0] == 1
        raise AssertionError("counting has no end")

    with ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(ask, number) for number in range(64)]
        try:
            assert train(settings) == 0
        finally:
            is_over.set()
    assert min(client.result() for client in asked) >= 3, "nobody was forgotten in the queue"
    alone = read_metrics(workspace / "runs/alone/metrics.jsonl")
    for line, other in zip(lines(workspace), alone, strict=True):
        assert line["groups_dropped_count"] == 0 and line["reward/far/attempts_mean"] == 1
        assert line["reward/far/queue_mean"] > 30, "it was in the midst of them"
        assert (line["reward_mean"], line["loss"]) == (other["reward_mean"], other["loss"])
    ends = [json.loads((workspace / f"runs/{name}/summary.json").read_text())["after"] for name in ("alone", "run")]
    assert ends[0]["tags"] == ends[1]["tags"] and ends[0]["reward_mean"] == ends[1]["reward_mean"]


def test_a_server_killed_and_restarted_in_mid_run(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run reaches its end; it asked again for what could not be scored meanwhile, or dropped and counted it, and
    never scored it 0."""
    servers = [Process("--reward", "jpeg", port=free_port())]

    def kill_and_restart() -> None:
        wait_for(lambda: iterations_done(workspace) >= 2)
        servers[0].kill()
        time.sleep(0.3)
        servers.append(Process("--reward", "jpeg", port=servers[0].port))

    step = Trainer.step

    def step_with_a_server_at_last(trainer: Trainer) -> Any:
        if trainer.iteration == 19:
            killer.join()
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", step_with_a_server_at_last)
    killer = in_background(kill_and_restart)
    try:
        assert train(["--rewards", servers[0].url, *SMALL, "--iterations=20", "--max-lost-iterations=1000"]) == 0
        assert len(servers) == 2
    finally:
        for server in servers:
            server.kill()
    found = lines(workspace)
    assert [line["iteration"] for line in found] == list(range(1, 21))
    attempts = f"reward/{servers[0].url}/attempts_mean"
    assert any(line["groups_dropped_count"] or line[attempts] > 1 for line in found), "the server was never away"
    assert sum(line["groups_dropped_count"] for line in found) == capsys.readouterr().out.count("group dropped: ")
    assert all(line["reward_mean"] is None or line["reward_mean"] < 0 for line in found), "0 is no JPEG's size"
    assert found[-1]["groups_dropped_count"] == 0, "the new server is used"


def test_a_server_that_stays_away_stops_the_run_with_a_checkpoint(workspace: Path, short_waits: None) -> None:
    """In one line, after the iterations that were asked for; with a server again, the run goes on to its end."""
    server = Process("--reward", "jpeg", port=free_port())

    def kill() -> None:
        wait_for(lambda: iterations_done(workspace) >= 2)
        server.kill()

    killer = in_background(kill)
    with pytest.raises(UserError, match=r"scored nothing in 2 iterations in a row; .*Connection refused"):
        train(["--rewards", server.url, *SMALL, "--iterations=400", "--max-lost-iterations=2"])
    killer.join()
    done = iterations_done(workspace)
    assert 2 <= done < 400 and list((workspace / "runs/run/checkpoints").glob(f"iteration-{done:06d}"))
    with reward_server("--reward", "jpeg", port=server.port):
        assert train(["--resume", "runs/run", f"--iterations={done + 2}"]) == 0
    assert [line["iteration"] for line in lines(workspace)] == list(range(1, done + 3))
    assert lines(workspace)[-1]["groups_dropped_count"] == 0


FAULTS: list[tuple[Any, str]] = [
    (b"{", "something that is not JSON"),
    ({"scores": [1.0]}, "1 numbers for 2 pictures"),
    (b'{"scores": [NaN, NaN]}', "something that is not JSON"),
    ({"scores": [None, None]}, "no numbers"),
    (b" " * (http_client.MAX_REPLY_BYTES + 1), "more than 16777216 bytes"),
    (None, "no answer within 0.5 s"),
]


def test_every_fault_of_a_server_costs_a_group_and_the_run_reaches_its_end(
    workspace: Path, short_waits: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken JSON, a wrong length, NaN, null, an oversized answer, silence: one after the other, one a request."""
    asked: list[int] = []

    def answer(path: str, body: bytes, handler: Any) -> Any:
        if path == "/health":
            return {"rewards": {"any": 1}}
        if path == "/check":
            return 404, {}
        size = len(json.loads(body)["images"])
        good = {"scores": [0.5 + 0.1 * place for place in range(size)]}
        if size == len(golden.squares()):  # at the start
            return good
        number = len(asked)
        asked.append(size)
        if size == 1 or number % 2:
            return good
        fault = FAULTS[number // 2 % len(FAULTS)][0]
        if fault is None:
            time.sleep(0.7)
        return fault

    with answering(answer) as url:
        (workspace / "far.py").write_text(
            "from dgpo_fast.rewards.remote.client import RemoteReward\n"
            f"def reward():\n    return RemoteReward({url!r}, deadline_s=0.5)\n"
        )
        monkeypatch.syspath_prepend(str(workspace))
        monkeypatch.setattr(RemoteReward, "groups_at_once", 1)
        assert train(["--rewards", "far=far:reward", *SMALL, "--iterations=4"]) == 0
    sys.modules.pop("far", None)
    found = lines(workspace)
    output = capsys.readouterr().out
    dropped = sum(line["groups_dropped_count"] for line in found)
    assert len(found) == 4 and dropped == output.count("group dropped: ") >= len(FAULTS)
    for _, reason in FAULTS:
        assert reason in output, reason
    assert all(line["reward_mean"] == pytest.approx(0.55) for line in found)


def no_folder_and_one_line(args: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any) -> str:
    monkeypatch.setattr(sys, "argv", ["train", *args, *SMALL])
    assert run_command(train) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 1 and not Path("runs").exists()
    return errors[0]


def test_no_server_no_token_and_oversized_pictures_end_before_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    url = f"http://127.0.0.1:{free_port()}"
    line = no_folder_and_one_line(["--rewards", url], monkeypatch, capfd)
    assert line.startswith(f"error: no reward server answers: {url}: Connection refused")
    (workspace / "token").write_text("a-token-of-some-length")
    with reward_server("--reward", "jpeg", "--token-file", str(workspace / "token")) as server:
        line = no_folder_and_one_line(["--rewards", server.url], monkeypatch, capfd)
        assert line == f"error: reward server {server.url} wants a token: put it into the environment variable " + (
            TOKEN_VARIABLE
        )
    with reward_server("--reward", "jpeg", "--max-megapixels", "0.0005") as server:
        line = no_folder_and_one_line(["--rewards", server.url], monkeypatch, capfd)
        assert line.endswith("image 0: 256 × 256 pixels, more than 500 that are left of --max-megapixels 0.0005")


def test_another_token_in_mid_run_stops_it_with_a_checkpoint(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, short_waits: None
) -> None:
    """A wrong set-up is no failure of a group: one line, nothing lost, and the right token goes on."""
    token = workspace / "token"
    token.write_text("a-token-of-some-length")
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-some-length")
    args = ("--reward", "jpeg", "--token-file", str(token))
    servers = [Process(*args, port=free_port())]

    def change_token() -> None:
        wait_for(lambda: iterations_done(workspace) >= 2)
        servers[0].kill()
        token.write_text("another-token-of-some-length")
        servers.append(Process(*args, port=servers[0].port))

    changer = in_background(change_token)
    try:
        many = ["--iterations=4000", "--max-lost-iterations=4000"]
        with pytest.raises(UserError, match=f"refuses the token in the environment variable {TOKEN_VARIABLE}$"):
            train(["--rewards", servers[0].url, *SMALL, *many])
        changer.join()
        done = iterations_done(workspace)
        monkeypatch.setenv(TOKEN_VARIABLE, "another-token-of-some-length")
        assert train(["--resume", "runs/run", f"--iterations={done + 1}"]) == 0
    finally:
        for server in servers:
            server.kill()
    assert [line["iteration"] for line in lines(workspace)] == list(range(1, done + 2))


def test_a_run_on_a_judge_keeps_its_key_to_itself(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores, their raw form and what they took are in the metrics; the key is in no file and on no line."""
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    keys: set[str] = set()

    def answer(path: str, body: bytes, handler: Any) -> Any:
        keys.add(handler.headers["Authorization"])
        if b" star" in body:
            return 400, {"error": {"message": "refused for sk-very-secret"}}
        return {"choices": [{"message": {"content": f"Score: {1 + len(body) % 5}"}}]}

    with answering(answer) as url:
        (workspace / "judge.yaml").write_text(
            f"url: {url}\nmodel: m\nprompt: 'Rate {{prompt}}'\nscore: 'Score: (.)'\napi_key_variable: MY_KEY\n"
            "self_test: answer\n"
        )
        assert train(["--rewards", "judge.yaml=2", *SMALL, "--rollout.groups=8", "--max-lost-iterations=99"]) == 0
    assert keys == {"Bearer sk-very-secret"}
    found = [line for line in lines(workspace) if line["reward_mean"] is not None]
    assert found and all(
        line["reward_mean"] == pytest.approx(2 / 5 * line["reward/judge.yaml/raw_mean"]) for line in found
    )
    for path in (workspace / "runs").rglob("*"):
        assert path.is_dir() or b"very-secret" not in path.read_bytes(), path
    output = capsys.readouterr()
    assert "very-secret" not in output.out + output.err
