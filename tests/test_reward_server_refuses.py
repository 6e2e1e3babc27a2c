"""The reward server as a process: what it refuses, and that it goes on serving."""

import base64
import io
import json
import pickle
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import load_rewards
from dgpo_fast.rewards.remote import png
from dgpo_fast.rewards.remote.client import TOKEN_VARIABLE, RemoteReward
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
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_rewards(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with limited_server(folder) as running:
        yield running


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
