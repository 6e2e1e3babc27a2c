"""JSON over HTTP for rewards on other machines: a deadline for the whole call, bounded retries, bounded answers."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import random
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import httpx

from dgpo_fast.errors import UserError
from dgpo_fast.records import refuse_constant
from dgpo_fast.wording import one_line

MAX_REPLY_BYTES = 16 * 2**20
# Too busy, restarting or behind a gateway that could not get through: the same request may go better in a while.
PASSING = (408, 429, 502, 503, 504)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0


class Unanswered(Exception):
    """A request got no usable answer; the text says why, in one line.

    Attributes:
        status: the HTTP status, None if there was no answer at all.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Reply(NamedTuple):
    """An answer.

    Attributes:
        content: the answer's JSON, unchecked.
        attempts: number of requests.
        seconds: of all of them.
    """

    content: Any
    attempts: int
    seconds: float


class JsonClient:
    """Asks one server, from any number of threads at a time. It opens a connection per request and follows no redirect.

    It goes through the proxy that the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY), but to this
    machine directly.

    After a failed call, each call makes only one attempt until the server answers again, so that a dead server costs a
    run no more than one round of retries.
    """

    def __init__(self, url: str, *, secret: str | None = None, deadline_s: float = 120.0, attempts: int = 6):
        """
        Args:
            url: the server's address, `http[s]://host[:port][/path]`.
            secret: sent as a bearer token, printable ASCII; no message ever holds it.
            deadline_s: seconds that a call may take, including all attempts and waits.
            attempts: maximum number of attempts, if another one may help.

        Raises:
            UserError: an invalid address or proxy, or a secret that cannot be sent.
        """
        if secret is not None and not (secret.isascii() and secret.isprintable() and " " not in secret):
            raise UserError(f"the secret for {url} holds blanks, line ends or letters beyond ASCII: write it again")
        self.url = url.rstrip("/")
        self._secret, self._deadline_s, self._attempts = secret, deadline_s, attempts
        self._reachable = True
        address = _address(url)
        proxy = _proxy(address)
        self._via = f" (by way of the proxy {proxy.host}; NO_PROXY goes without)" if proxy else ""
        is_tls = address.scheme == "https"
        self._client = httpx.Client(
            proxy=proxy,
            trust_env=False,  # `_proxy` and OpenSSL read the environment
            verify=ssl.create_default_context() if is_tls else False,  # certificates take 0.1 s to load
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

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
            except (httpx.TransportError, _Passing) as error:
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
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        received = bytearray()
        with (
            _shut_at(ends) as trace,
            self._client.stream(
                method,
                self.url + path,
                content=None if body is None else io.BytesIO(body),  # in pieces: httpx copies what a send leaves
                headers=headers,
                timeout=max(ends - time.monotonic(), 0.001),
                extensions={"trace": trace},
            ) as response,
        ):
            for piece in response.iter_raw():
                received += piece
                if len(received) > MAX_REPLY_BYTES:
                    raise Unanswered(f"{self.url} answers with more than {MAX_REPLY_BYTES} bytes", response.status_code)
        data = bytes(received)
        if response.status_code in PASSING:
            raise _Passing(response.status_code, self._shown(_error_in(data)), response.headers.get("Retry-After"))
        if response.status_code != 200:
            reason = self._shown(_error_in(data)) or f"status {response.status_code}"
            raise Unanswered(reason, response.status_code)
        return self._parsed(data)

    def _parsed(self, data: bytes) -> Any:
        try:
            return json.loads(data, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            raise Unanswered(
                f"{self.url} answers with something that is not JSON: {self._shown(repr(data[:60]))}", 200
            ) from None

    def _unanswered(self, error: Exception, attempts: int, late: bool) -> Unanswered:
        if isinstance(error, _Passing):
            reason = str(error)
        elif late or isinstance(error, httpx.TimeoutException):
            reason = f"no answer within {self._deadline_s:g} s"
        else:
            reason = _reason(error)
        times = f" ({attempts} attempts)" if attempts > 1 else ""
        return Unanswered(f"{self.url}{self._via}: {self._shown(reason)}{times}", getattr(error, "status", None))

    def _shown(self, text: str) -> str:
        """`text` from the server for one line of a message, without the secret, which a server may repeat."""
        line = one_line(text)[:200]
        return line.replace(self._secret, "…") if self._secret else line


class _Passing(Exception):
    """The server says that trying again may help."""

    def __init__(self, status: int, message: str, retry_after: str | None):
        super().__init__(message or f"status {status}")
        self.status, self.retry_after = status, retry_after


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an IP address, is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(url: str) -> httpx.URL:
    """`url`, if it is an address that can be asked."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        shown = url.rpartition("@")[2]  # not the password before it
        raise UserError(f"address {shown!r}: {error}: write http://host:port") from None
    if address.userinfo:
        raise UserError(f"address of {address.host!r}: holds a name or password: secrets go into the environment")
    is_complete = address.scheme in ("http", "https") and address.host and (address.port or 0) < 2**16
    if not is_complete or address.query or address.fragment:
        raise UserError(f"address {url!r}: write http://host:port or https://host:port")
    return address


def _proxy(address: httpx.URL) -> httpx.URL | None:
    """The proxy that the environment names for `address`; None for this machine itself."""
    named = urllib.request.getproxies()
    proxy = named.get(address.scheme) or named.get("all")
    if not proxy or is_loopback(address.host) or urllib.request.proxy_bypass(address.netloc.decode()):
        return None
    try:
        url = httpx.URL(proxy if "://" in proxy else f"http://{proxy}")
    except httpx.InvalidURL as error:
        raise UserError(f"the environment's proxy for {address}: {error}: mend HTTP_PROXY") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"the environment's proxy for {address}: no http:// or https:// address: mend HTTP_PROXY")
    return url


@contextlib.contextmanager
def _shut_at(ends: float) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """A `trace` for httpx that shuts each connection down at `ends`, in `time.monotonic()` seconds.

    Timeouts of httpx are for each read; this one is for all of them, however slowly an answer trickles in.
    """
    timers: list[threading.Timer] = []

    def trace(event: str, info: Mapping[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            timers.append(threading.Timer(max(ends - time.monotonic(), 0), _shut, (connection,)))
            timers[-1].daemon = True
            timers[-1].start()

    try:
        yield trace
    finally:
        for timer in timers:
            timer.cancel()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed in the meantime
        connection.shutdown(socket.SHUT_RDWR)


def _reason(error: BaseException) -> str:
    """Why there is no answer: as the operating system says, if it is the cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).rstrip(".") or type(error).__name__


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
