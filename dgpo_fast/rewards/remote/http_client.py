"""JSON over HTTP for rewards on other machines: a deadline for the whole call, bounded retries, bounded answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dgpo_fast.errors import UserError

MAX_REPLY_BYTES = 16 * 2**20
# Too busy, restarting or behind a gateway that could not get through: the same request may go better in a while.
PASSING = (408, 429, 502, 503, 504)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0


class Unanswered(Exception):
    """A request got no answer that is of use, in one line.

    Attributes:
        status: the HTTP status, None where there was no answer at all.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Reply(NamedTuple):
    """What came back."""

    content: Any
    attempts: int
    seconds: float


class JsonClient:
    """Asks one server, from any number of threads at a time. It opens a connection per request and follows no redirect.

    A server that could not be reached is asked once per call, without waiting, until it answers again, so that a dead
    one costs a run no more than one round of retries.
    """

    def __init__(self, url: str, *, secret: str | None = None, deadline_s: float = 120.0, attempts: int = 6):
        """
        Args:
            url: where the server is, `http[s]://host[:port][/path]`.
            secret: sent as a bearer token, printable ASCII; no message ever holds it.
            deadline_s: what a call may take, all attempts and waits together.
            attempts: how often a call is tried where trying again may help.

        Raises:
            UserError: an address that is none, or a secret that cannot be sent.
        """
        if secret is not None and not (secret.isascii() and secret.isprintable() and " " not in secret):
            raise UserError(f"the secret for {url} holds blanks, line ends or letters beyond ASCII: write it anew")
        self.url = url.rstrip("/")
        self._secret, self._deadline_s, self._attempts = secret, deadline_s, attempts
        self._reachable = True
        self._connect, self._host, self._port, self._path = _address(url)

    def get(self, path: str) -> Reply:
        """The JSON at `path` below the address. Raises Unanswered."""
        return self._call("GET", path, None)

    def post(self, path: str, body: bytes) -> Reply:
        """The JSON that answers `body`, itself JSON, sent to `path` below the address. Raises Unanswered."""
        return self._call("POST", path, body)

    def _call(self, method: str, path: str, body: bytes | None) -> Reply:
        started = time.monotonic()
        ends = started + self._deadline_s
        attempts = self._attempts if self._reachable else 1
        for attempt in range(1, attempts + 1):
            try:
                content = self._once(method, path, body, ends)
            except (OSError, http.client.HTTPException, _Passing) as error:
                late = time.monotonic() >= ends
                wait_s = _wait_s(attempt, error)
                if late or attempt == attempts or time.monotonic() + wait_s >= ends:
                    self._reachable = False
                    raise self._unanswered(error, attempt, late) from None
                time.sleep(wait_s)
            else:
                self._reachable = True
                return Reply(content, attempt, time.monotonic() - started)
        raise AssertionError("at least one attempt is made")

    def _once(self, method: str, path: str, body: bytes | None, ends: float) -> Any:
        connection = self._connect(self._host, self._port, timeout=max(ends - time.monotonic(), 0.001))
        connection.connect()
        # Timeouts of sockets are for each read; this one is for all of them, however slowly an answer trickles in.
        timer = threading.Timer(max(ends - time.monotonic(), 0), _shut, (connection.sock,))
        timer.daemon = True
        timer.start()
        try:
            # A server that refuses a body may hang up before it has all of it; its answer, with the reason, is there.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._path + path, body, self._headers())
            response = connection.getresponse()
            data = response.read(MAX_REPLY_BYTES + 1)
        finally:
            timer.cancel()
            connection.close()
        if len(data) > MAX_REPLY_BYTES:
            raise Unanswered(f"{self.url} answers with more than {MAX_REPLY_BYTES} bytes", response.status)
        if response.length:
            raise http.client.IncompleteRead(data, response.length)
        if response.status in PASSING:
            raise _Passing(response.status, self._shown(_error_in(data)), response.getheader("Retry-After"))
        if response.status != 200:
            raise Unanswered(self._shown(_error_in(data)) or f"status {response.status}", response.status)
        return self._parsed(data)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        return headers | ({"Authorization": f"Bearer {self._secret}"} if self._secret else {})

    def _parsed(self, data: bytes) -> Any:
        try:
            return json.loads(data, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise Unanswered(f"{self.url} answers with what is no JSON: {self._shown(repr(data[:60]))}", 200) from None

    def _unanswered(self, error: Exception, attempts: int, late: bool) -> Unanswered:
        if isinstance(error, _Passing):
            reason = str(error)
        elif late or isinstance(error, TimeoutError):
            reason = f"no answer within {self._deadline_s:g} s"
        else:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        times = f" ({attempts} attempts)" if attempts > 1 else ""
        return Unanswered(f"{self.url}: {self._shown(reason)}{times}", getattr(error, "status", None))

    def _shown(self, text: str) -> str:
        """`text` from the server, fit for one line of a message; a server may repeat the secret it was sent."""
        line = " ".join(text.split())[:200]
        return line.replace(self._secret, "…") if self._secret else line


class _Passing(Exception):
    """The server says that trying again may help."""

    def __init__(self, status: int, message: str, retry_after: str | None):
        super().__init__(message or f"status {status}")
        self.status, self.retry_after = status, retry_after


def _address(url: str) -> tuple[type[http.client.HTTPConnection], str, int, str]:
    """Kind of connection, host, port and path of an address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"address {url!r}: {error}: write http://host:port") from None
    if parts.username or parts.password:
        raise UserError(f"address of {parts.hostname!r}: holds a name or password: secrets go into the environment")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"address {url!r}: write http://host:port or https://host:port")
    is_tls = parts.scheme == "https"
    connect = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
    return connect, parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/")


def _wait_s(attempt: int, error: Exception) -> float:
    """Twice as long after each attempt, not all clients at the same moment, and as long as the server asks for."""
    wait_s = min(_FIRST_WAIT_S * 2 ** (attempt - 1), _LONGEST_WAIT_S) * random.SystemRandom().uniform(0.5, 1.0)
    asked = getattr(error, "retry_after", None) or ""
    return max(wait_s, float(asked)) if asked.isascii() and asked.isdigit() else wait_s


def _error_in(data: bytes) -> str:
    """The message in an answer that refuses: under "error", as a text or as OpenAI's object."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    error = content.get("error") if isinstance(content, Mapping) else None
    if isinstance(error, Mapping):
        error = error.get("message")
    return error if isinstance(error, str) else ""


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed in the meantime
        sock.shutdown(socket.SHUT_RDWR)
