"""What the reward server waits for, and for how long: each bound, made short, in a server of this process."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dgpo_fast.rewards.serving import http_server
from dgpo_fast.rewards.serving.service import Limits, RewardService
from dgpo_fast.rewards.weighted import WeightedReward
from tests.servers import wait_for

HEAD = b"POST /check HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def running() -> Iterator[Any]:
    """A server, with the port it is at."""
    reward = WeightedReward({"none": lambda images, *_: np.zeros(len(images), np.float32)}, {"none": 1.0})
    service = RewardService(reward, Limits(images=8, pixels=10**6, waiting=8, deadline_s=10))
    server = http_server.Server(service, None, 2**20, "up")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.port = listener.getsockname()[1]  # type: ignore[attr-defined]
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listener]),))
        thread.start()
        wait_for(lambda: server.started)
        yield server
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(running: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=60)


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of all that comes until the connection is closed; 0 and None if nothing comes."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head[9:12]), json.loads(body)) if received else (0, None)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", (0, None)),
        (b"POST /check?", (0, None)),
        (HEAD % 1000, (408, {"error": "the request was not complete within 0.3 s"})),
    ],
)
@pytest.mark.parametrize("trickles", [False, True])
def test_a_client_that_is_slow_is_cut(
    running: Any, sent: bytes, expected: Any, trickles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In silence before a whole head, by status 408 after it; however steadily its bytes come."""
    monkeypatch.setattr(http_server, "BODY_S" if expected[0] else "HEADERS_S", 0.3)
    with connect(running) as connection:
        started = time.monotonic()
        connection.sendall(sent)
        is_over = threading.Event()

        def trickle() -> None:
            while not is_over.wait(0.05):
                with contextlib.suppress(OSError):
                    connection.send(b"a")

        thread = threading.Thread(target=trickle) if trickles else threading.Thread()
        thread.start()
        assert answer(connection) == expected and time.monotonic() - started > 0.2
        is_over.set()
        thread.join()


def test_connections_are_bounded(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is closed at once; when the others are gone, the next one is served."""
    monkeypatch.setattr(http_server, "HEADERS_S", 100.0)
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 4)
    strangers = [connect(running) for _ in range(4)]
    wait_for(lambda: len(running.server_state.connections) == 4)
    with connect(running) as one_more:
        assert answer(one_more) == (0, None)
    for stranger in strangers:
        stranger.close()
    wait_for(lambda: not running.server_state.connections)
    with connect(running) as next_one:
        next_one.sendall(HEAD % 2 + b"{}")
        assert answer(next_one) == (200, {"queue": 0})


def test_large_bodies_are_bounded_together(running: Any) -> None:
    """While others hold the memory for bodies, one more is refused; it may come again."""
    holders = [connect(running) for _ in range(http_server.MAX_BODIES)]
    for holder in holders:
        holder.sendall(HEAD % 2**20)
    wait_for(lambda: len(running.server_state.tasks) == len(holders))
    with connect(running) as one_more:
        one_more.sendall(HEAD % 2 + b"{}")
        assert answer(one_more) == (503, {"error": "the reward server holds too many large requests"})
    holders.pop().close()
    wait_for(lambda: len(running.server_state.tasks) == len(holders))
    with connect(running) as next_one:
        next_one.sendall(HEAD % 2 + b"{}")
        assert answer(next_one)[0] == 200
    for holder in holders:
        holder.close()


def test_a_client_that_sends_on_without_end_is_cut(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the reason, and a moment to read it."""
    monkeypatch.setattr(http_server, "LINGER_S", 0.3)
    with connect(running) as connection:
        connection.sendall(HEAD % 2**30)
        connection.sendall(b" " * 1000)
        started = time.monotonic()
        assert answer(connection) == (413, {"error": f"{2**30} bytes, more than --max-body-mib 1"})
        assert time.monotonic() - started > 0.2


def test_a_client_that_does_not_read_is_cut(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer, larger than what the system keeps for it, is dropped."""
    monkeypatch.setattr(http_server, "SEND_S", 0.3)
    monkeypatch.setattr(RewardService, "health", lambda self: {"much": "a" * 50_000_000})
    with connect(running) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_for(lambda: running.server_state.connections)
        wait_for(lambda: not running.server_state.connections)


CLOSE = (HEAD % 2).replace(b"Host", b"Connection: close\r\nHost")
UPGRADE = (HEAD % 2).replace(b"Host", b"Connection: upgrade\r\nUpgrade: websocket\r\nHost")
CHUNKED = b"POST /check HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (HEAD % 2 + b"{}" + HEAD % 2 + b"{}", 200),
        (CLOSE + b"{}garbage", 200),
        (CLOSE + b"{}\r\n", 200),
        (UPGRADE + b"{}", 200),
        (CHUNKED, 411),
        ((HEAD % 2).replace(b"Host", b"Expect: 100-continue\r\nHost") + b"{}", 200),
    ],
)
@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_what_follows_a_request_changes_nothing(
    running: Any, sent: bytes, expected: int, pause_s: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """One answer, and nothing that the server has to say about it."""
    with connect(running) as connection:
        connection.sendall(sent[:-5])
        time.sleep(pause_s)
        connection.sendall(sent[-5:])
        received = b""
        while piece := connection.recv(65536):
            received += piece
    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 %d " % expected) and received.count(b"HTTP/1.1") == 1
    assert capfd.readouterr().err == ""


def test_clients_that_are_slow_do_not_hold_up_its_end(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "BODY_S", 100.0)
    with connect(running) as connection:
        connection.sendall(HEAD % 2**20)
        wait_for(lambda: running.server_state.tasks)
        running.should_exit = True
        assert answer(connection) == (0, None), "it is cut, so that it comes again"
