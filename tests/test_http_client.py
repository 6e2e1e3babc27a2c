"""JSON over HTTP: deadlines, retries, bounded answers, and secrets that stay secret."""

import socket
import threading
import time
from typing import Any

import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.remote import http_client
from dgpo_fast.rewards.remote.http_client import JsonClient, Unanswered
from tests.servers import answering, free_port


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_FIRST_WAIT_S", 0.01)


def failure(client: JsonClient, path: str = "/x") -> Unanswered:
    with pytest.raises(Unanswered) as caught:
        client.post(path, b"{}")
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_answer_comes_with_what_it_took() -> None:
    with answering(lambda path, body, _: {"path": path, "body": body.decode()}) as url:
        reply = JsonClient(f"{url}/base/").post("/score", b"[1]")
    assert reply.content == {"path": "/base/score", "body": "[1]"} and reply.attempts == 1 and 0 < reply.seconds < 10


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_passing_trouble_is_tried_again(status: int) -> None:
    calls = []

    def answer(path: str, body: bytes, _: Any) -> Any:
        calls.append(path)
        return {"ok": True} if len(calls) == 3 else (status, {"error": "not now"})

    with answering(answer) as url:
        assert JsonClient(url).get("/health").attempts == 3


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422, 500])
def test_any_other_trouble_is_not(status: int) -> None:
    calls: list[str] = []

    def answer(path: str, body: bytes, _: Any) -> Any:
        calls.append(path)
        return status, {"error": {"message": "told\nso"}}

    with answering(answer) as url:
        error = failure(JsonClient(url))
    assert len(calls) == 1 and error.status == status and str(error) == "told so"


def test_attempts_are_bounded_and_a_dead_server_is_asked_once_from_then_on() -> None:
    calls: list[str] = []

    def answer(path: str, body: bytes, _: Any) -> Any:
        calls.append(path)
        return (503, {"error": "busy"}) if len(calls) <= 5 else {}

    with answering(answer) as url:
        client = JsonClient(url, attempts=4)
        assert str(failure(client)) == f"{url}: busy (4 attempts)" and len(calls) == 4
        assert str(failure(client)) == f"{url}: busy" and len(calls) == 5
        assert client.post("/x", b"{}").attempts == 1
        calls.clear()
        assert str(failure(client)) == f"{url}: busy (4 attempts)", "it had answered again"


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert str(failure(JsonClient(url, attempts=2))) == f"{url}: Connection refused (2 attempts)"


def test_the_server_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def answer(path: str, body: bytes, handler: Any) -> Any:
        handler.send_response(429)
        handler.send_header("Retry-After", "7")
        handler.end_headers()

    with answering(answer) as url:
        failure(JsonClient(url, attempts=3, deadline_s=100))
        failure(JsonClient(url, attempts=3, deadline_s=5))
    assert waits == [7, 7], "and not at all where the deadline is before that"


def test_waits_double_up_to_eight_seconds_and_no_two_clients_come_back_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each wait is half to all of 0.5, 1, 2, 4, 8, 8, 8 s, drawn anew by every client."""
    monkeypatch.undo()  # the waits as they ship
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with answering(lambda *_: (503, {"error": "busy"})) as url:
        for _ in range(2):
            failure(JsonClient(url, attempts=8, deadline_s=1000))
    bounds = [0.5, 1, 2, 4, 8, 8, 8] * 2
    assert len(waits) == len(bounds)
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True)), waits
    assert waits[:7] != waits[7:]


def trickle(path: str, body: bytes, handler: Any) -> None:
    """A byte now and then, for ever, so that no single read ever takes long."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 100_000:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def silence(path: str, body: bytes, handler: Any) -> None:
    time.sleep(3)


@pytest.mark.parametrize("answer", [trickle, silence])
def test_the_deadline_holds_however_an_answer_is_late(answer: Any) -> None:
    with answering(answer) as url:
        started = time.monotonic()
        assert str(failure(JsonClient(url, deadline_s=0.4))) == f"{url}: no answer within 0.4 s"
        assert time.monotonic() - started < 2


def test_a_server_that_never_reads_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        client = JsonClient(url, deadline_s=0.5)
        with pytest.raises(Unanswered, match=r"no answer within 0\.5 s"):
            client.post("/x", b" " * 50_000_000)


def test_a_refusal_is_read_though_the_server_hangs_up_while_the_body_is_on_its_way() -> None:
    def refuse(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.recv(1)
        reason = b'{"error": "too large"}'
        connection.sendall(b"HTTP/1.1 413 No\r\nContent-Length: %d\r\n\r\n%s" % (len(reason), reason))
        connection.close()  # what was not read makes it a reset

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=refuse, args=(server,))
        thread.start()
        with pytest.raises(Unanswered, match=r"^too large$") as refusal:
            JsonClient(f"http://127.0.0.1:{server.getsockname()[1]}", attempts=1).post("/x", b" " * 50_000_000)
        thread.join()
    assert refusal.value.status == 413


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html>", "answers with something that is not JSON: b'<html>'"),
        (b'{"scores": [NaN]}', "answers with something that is not JSON: b'{\"scores\": [NaN]}'"),
        (b"[" * 200_000, "answers with something that is not JSON: b'[[["),
        (b" " * (http_client.MAX_REPLY_BYTES + 1), f"answers with more than {http_client.MAX_REPLY_BYTES} bytes"),
    ],
)
def test_answers_that_are_no_use(content: bytes, expected: str) -> None:
    with answering(lambda *_: content) as url:
        assert expected in str(failure(JsonClient(url)))


def test_a_truncated_answer_is_asked_for_again() -> None:
    calls: list[str] = []

    def answer(path: str, body: bytes, handler: Any) -> Any:
        calls.append(path)
        if len(calls) > 1:
            return [1, 2]
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"[1, 2]")

    with answering(answer) as url:
        assert JsonClient(url).get("/").content == [1, 2] and len(calls) == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "Server disconnected without sending a response"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "illegal status line: bytearray(b'SSH-2.0-OpenSSH')"),
    ],
)
def test_what_is_no_http(said: bytes, reason: str) -> None:
    def answer(path: str, body: bytes, handler: Any) -> None:
        handler.wfile.write(said)

    with answering(answer) as url:
        assert str(failure(JsonClient(url, attempts=2))) == f"{url}: {reason} (2 attempts)"


def test_the_secret_is_sent_and_never_shown() -> None:
    seen: list[str] = []

    def answer(path: str, body: bytes, handler: Any) -> Any:
        seen.append(handler.headers["Authorization"])
        return 401, {"error": {"message": "Incorrect API key provided: sk-12345"}}

    with answering(answer) as url:
        error = failure(JsonClient(url, secret="sk-12345"))
    assert seen == ["Bearer sk-12345"] and str(error) == "Incorrect API key provided: …"


@pytest.mark.parametrize("secret", ["two words", "line\nend", "größe", "tab\t"])
def test_a_secret_that_cannot_be_sent_is_not_shown_either(secret: str) -> None:
    with pytest.raises(UserError) as caught:
        JsonClient("http://127.0.0.1", secret=secret)
    assert secret not in str(caught.value) and "holds blanks" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:port", "http://a:99999", "http://a?b=c", "http://a#b"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="write http://host:port"):
        JsonClient(url)


def test_an_address_with_a_password_is_refused_without_it() -> None:
    with pytest.raises(UserError, match=r"^address of 'host': holds a name or password: secrets") as caught:
        JsonClient("http://me:hunter2@host:80")
    assert "hunter2" not in str(caught.value)


def test_an_address_with_a_password_and_a_bad_port_is_refused_without_it() -> None:
    with pytest.raises(UserError, match=r"^address 'host:port': Invalid port: 'port': write http://host:port$"):
        JsonClient("http://me:hunter2@host:port")


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine names is not named."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_another_machine_is_asked_through_the_proxy(
    name: str, no_proxies: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which sees the whole address and the token; NO_PROXY goes without it."""

    def proxy(path: str, body: bytes, handler: Any) -> Any:
        return {"path": path, "body": body.decode(), "token": handler.headers["Authorization"]}

    with answering(proxy) as url:
        monkeypatch.setenv(name, url if name == "HTTP_PROXY" else url.removeprefix("http://"))
        reply = JsonClient("http://gpu2.invalid:8000/base", secret="sk-12345").post("/score", b"[1]")
        assert reply.content == {
            "path": "http://gpu2.invalid:8000/base/score",
            "body": "[1]",
            "token": "Bearer sk-12345",
        }
        for without in ("a.invalid,gpu2.invalid", ".invalid", "gpu2.invalid:8000", "*"):
            monkeypatch.setenv("NO_PROXY", without)
            error = failure(JsonClient("http://gpu2.invalid:8000", attempts=1))
            assert error.status is None and "proxy" not in str(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "[::1]"])
def test_this_machine_is_asked_directly(host: str, no_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though every proxy that is named is dead."""
    for name in PROXIES[:3]:
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with answering(lambda path, *_: path, host="::1" if host == "[::1]" else "") as url:
        port = url.rpartition(":")[2]
        assert JsonClient(f"http://{host}:{port}").get("/health").content == "/health"


def test_a_dead_proxy_is_named_without_its_password(no_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://me:hunter2@127.0.0.1:{free_port()}")
    assert str(failure(JsonClient("http://gpu2.invalid:8000", attempts=1))) == (
        "http://gpu2.invalid:8000 (by way of the proxy 127.0.0.1; NO_PROXY goes without): Connection refused"
    )


@pytest.mark.parametrize("proxy", ["socks5://me:hunter2@a:1", "http://me:hunter2@a:port", "http://", "a b\n"])
def test_proxies_that_are_none(proxy: str, no_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(UserError, match=r"^the environment's proxy for http://gpu2: .*: mend HTTP_PROXY$") as caught:
        JsonClient("http://gpu2")
    assert "hunter2" not in str(caught.value)


def test_many_threads_may_ask_at_a_time() -> None:
    together = threading.Barrier(8, timeout=20)

    def answer(path: str, body: bytes, _: Any) -> Any:
        together.wait()
        return body.decode()

    with answering(answer) as url:
        client, got = JsonClient(url), {}

        def ask(number: int) -> None:
            got[number] = client.post("/", str(number).encode()).content

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {number: str(number) for number in range(8)}
