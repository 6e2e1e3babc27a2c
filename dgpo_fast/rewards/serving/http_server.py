"""The reward server's HTTP: what each address answers, and bounds on what a client may send and how long it may take.

Starlette has the addresses, uvicorn and h11 the protocol. Bounds that these lack are in `_Connection` and `_Gate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dgpo_fast.config.command_line import BAD_INPUT
from dgpo_fast.rewards.serving.service import Refused, RewardService

HEADERS_S, BODY_S, SEND_S, LINGER_S = 10.0, 60.0, 30.0, 1.0
MAX_CONNECTIONS = 256
MAX_HEADERS = 100
MAX_LINE_BYTES = 2**16
MAX_BODIES = 8  # of the largest size, that are held at a time
STATUS_EVERY_S = 60.0
HANGS = 10.0
"""Multiple of the deadline after which the reward is considered to hang."""


class Server(uvicorn.Server):
    """Serves until a signal, or until the reward hangs.

    Args:
        service: answers the requests, one at a time.
        token: what clients must send; None: nothing.
        max_body_bytes: size of one request.
        greeting: printed when the server answers.
    """

    def __init__(self, service: RewardService, token: str | None, max_body_bytes: int, greeting: str):
        self._service, self._greeting = service, greeting
        self._said = (time.monotonic(), service.counts.line())
        super().__init__(
            uvicorn.Config(
                application(service, token, max_body_bytes),
                http=_Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                h11_max_incomplete_event_size=MAX_LINE_BYTES,
                backlog=128,
                headers=[("Server", "dgpo_fast"), ("Connection", "close")],
                proxy_headers=False,
                callback_notify=self._watch,
                timeout_notify=0,
                log_config=None,
                log_level="critical",  # requests are counted, not listed
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets)
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal closes the server; the second one ends the process as it is."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes the request that is being scored, refuses all others, and lets answers go out, a second at most."""
        print("closing, once the request that is being scored is finished", flush=True)
        for server in self.servers:
            server.close()
        await self._service.close()
        asyncio.get_running_loop().call_later(1.0, self._cut)
        await super().shutdown(sockets)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _watch(self) -> None:
        """Says now and then what was done, when something was. Ends the process if the reward hangs."""
        busy_s = self._service.busy_s
        if busy_s > HANGS * self._service.limits.deadline_s:
            print(
                f"error: the reward has been at one request for {busy_s:.0f} s, {HANGS:g} times --deadline-s, "
                "and cannot be stopped: fix it, or raise --deadline-s, and start the server again",
                file=sys.stderr,
                flush=True,
            )
            os._exit(BAD_INPUT)  # anything else would wait for the thread that hangs
        said_s, last = self._said
        line = self._service.counts.line()
        if line != last and time.monotonic() - said_s >= STATUS_EVERY_S:
            self._said = (time.monotonic(), line)
            print(line, flush=True)


def application(service: RewardService, token: str | None, max_body_bytes: int) -> Starlette:
    """What each address answers."""
    memory = _Memory(MAX_BODIES * max_body_bytes)

    async def health(request: Request) -> Response:
        return JSONResponse(service.health())

    async def work(request: Request) -> Response:
        size = _size(request.headers, max_body_bytes)
        with memory.of(size):
            body = await _body(request, size)
            is_gone = request.state.connection.is_gone
            return JSONResponse(await service.answer(request.url.path, body, is_gone))

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        service.counts.add(refused=1)
        return _Refusal({"error": str(error)}, error.status)

    async def unknown(request: Request, error: Exception) -> Response:
        address = f"no such address {request.url.path[:60]!r}: there are /health, /score, /check"
        return await refuse(request, Refused(404, address))

    async def failed(request: Request, error: Exception) -> Response:
        kind = type(error).__name__
        print(f"a request could not be handled: {kind}: {error}", file=sys.stderr, flush=True)
        return await refuse(request, Refused(500, f"the reward server failed: {kind}"))

    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/score", work, methods=["POST"]),
            Route("/check", work, methods=["POST"]),
        ],
        middleware=[Middleware(_Gate, token=token, refuse=refuse)],
        exception_handlers={Refused: refuse, HTTPException: unknown, Exception: failed},
    )
    app.router.redirect_slashes = False
    app.state.counts = service.counts
    return app


Refuse = Callable[[Request, Exception], Awaitable[Response]]


class _Gate:
    """Refuses requests without the token before their body is read."""

    def __init__(self, app: ASGIApp, token: str | None, refuse: Refuse):
        self._app, self._token, self._refuse = app, token, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope, Headers(scope=scope))
        except Refused as refused:
            response = await self._refuse(Request(scope), refused)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Refused(505, f"Invalid HTTP version ({scope['http_version']})")
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_LINE_BYTES:
            raise Refused(414, "the request's first line is too long")
        if len(headers) > MAX_HEADERS or any(len(name) + len(value) > MAX_LINE_BYTES for name, value in headers.raw):
            raise Refused(431, "too many headers, or too long ones")
        if scope["method"] not in ("GET", "POST"):
            raise Refused(501, f"Unsupported method ({scope['method']!r})")
        given = headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self._token is not None and not hmac.compare_digest(given.encode(), self._token.encode()):
            raise Refused(401, "the token is missing or wrong")


class _Refusal(JSONResponse):
    """Why a request is refused. Reads on for a moment, if not all of it was read: a client that finds the connection
    cut while it still sends never sees the reason."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        cycle = scope["state"]["connection"].cycle
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while cycle.more_body and (await receive())["type"] == "http.request":
                    pass
        await send({"type": "http.response.body"})


class _Memory:
    """Bytes that requests may take, all together."""

    def __init__(self, size: int):
        self._free = size

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Takes `size` bytes. Raises Refused if too many large requests are being held."""
        if size > self._free:
            raise Refused(503, "the reward server holds too many large requests")
        self._free -= size
        try:
            yield
        finally:
            self._free += size


def _size(headers: Headers, most: int) -> int:
    """Bytes of the body that follows. Raises Refused if they are not stated, more than `most`, or no JSON."""
    length = headers.get("Content-Length")
    if length is None or "Transfer-Encoding" in headers:
        raise Refused(411, "one Content-Length is needed")
    # A web page can have a browser send any type but this one without asking the server first.
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Content-Type must be application/json")
    if int(length) > most:
        raise Refused(413, f"{length} bytes, more than --max-body-mib {most // 2**20}")
    return int(length)


async def _body(request: Request, size: int) -> bytes:
    """What was sent. Raises Refused if it ends early or is slow in coming."""
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.body()
    except TimeoutError:
        raise Refused(408, f"the request was not complete within {BODY_S:g} s") from None
    except ClientDisconnect:
        body = b""
    if len(body) < size:
        raise Refused(400, "the request ended early")
    return body


class _Connection(H11Protocol):
    """One connection, which brings one request, with deadlines for what uvicorn waits for without end."""

    def __init__(self, **given: Any) -> None:  # as uvicorn makes it
        super().__init__(**given)
        self.app_state = {"connection": self}
        self._timer: asyncio.TimerHandle | None = None
        self._is_gone = False

    def is_gone(self) -> bool:
        """Whether the client has hung up; it sends nothing else while it waits."""
        return self._is_gone

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._allow(HEADERS_S)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is not h11.ERROR:  # else refused already
            super().data_received(data)
        if self.cycle is not None and self._timer is not None:
            self._timer.cancel()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn closes: True keeps the connection for the answer
        """The client sends no more, but may read."""
        self._is_gone = True
        if self.cycle is not None:
            self._end_body()
        elif self.conn.trailing_data[0] and self.conn.their_state is not h11.ERROR:
            self._refuse(400, "the request ended early")
        return self.cycle is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_gone = True
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._allow(SEND_S)

    def send_400_response(self, msg: str) -> None:
        """Says what h11, whose error is being handled, finds wrong with a request."""
        error = sys.exception()
        if self.cycle is not None:  # the head was fine: the answer is to what there is of the body
            self._end_body()
            return
        message = str(error) or msg
        status = getattr(error, "error_status_hint", 400)
        if status == 431 and b"\n" not in self.conn.trailing_data[0]:
            status, message = 414, "the request's first line is too long"
        elif message == "conflicting Content-Length headers":
            status, message = 411, "one Content-Length is needed"
        self._refuse(status, message)

    def _end_body(self) -> None:
        self.cycle.more_body = False
        self.cycle.message_event.set()

    def _refuse(self, status: int, message: str) -> None:
        self.config.app.state.counts.add(refused=1)  # type: ignore[union-attr]  # the app is `application`'s
        response = JSONResponse({"error": message}, status)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        head = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase.encode())
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._allow(LINGER_S)

    def _allow(self, seconds: float) -> None:
        """Cuts the connection after `seconds`, unless they are cancelled or allowed anew."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.transport.abort)
