"""`python -m dgpo_fast.reward_server --reward NAME …`: rewards for runs on other machines, or in other environments.

JSON and PNG files over HTTP (see `rewards.remote` for the requests): nothing that comes in is ever executed. Without a
token only this machine may ask.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config import STRICT, Count, Positive
from dgpo_fast.config.command_line import BAD_INPUT
from dgpo_fast.config.help import print_settings
from dgpo_fast.config.reading import parse_overrides, resolve
from dgpo_fast.errors import UserError
from dgpo_fast.rewards.serving.service import Limits, Refused, RewardService

USAGE = """Score pictures for runs on other machines or in other environments.

  python -m dgpo_fast.reward_server --reward ocr
  python -m dgpo_fast.reward_server --reward pickscore=1 aesthetic=0.2 --host 0.0.0.0 --token-file token.txt

In the run: --rewards http://HOST:PORT, with the token in the environment variable DGPO_REWARD_TOKEN."""

MIN_TOKEN_LENGTH = 16
HEADERS_S, BODY_S, SEND_S, LINGER_S = 10.0, 60.0, 30.0, 1.0
MAX_CONNECTIONS = 256
MAX_BODIES = 8  # of the largest size, that are held at a time
STATUS_EVERY_S = 60.0
HANGS = 10.0
"""Times --deadline-s, after which a request that is being scored is thought to hang."""


@dataclass(kw_only=True, config=STRICT)
class ServerSettings:
    """A reward server."""

    reward: tuple[str, ...] = ()
    """What scores: names, `module:attribute` or judges' files, with `=weight`, as in a run's `--rewards`."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at. 0: one that is free."""
    token_file: str | None = None
    """A file with the token, 16 characters or more, that clients must send."""
    max_images: Count = 256
    """Images of one request."""
    max_megapixels: Positive = 64.0
    """Pixels of all images of one request, in millions."""
    max_body_mib: Count = 128
    """Size of one request."""
    max_waiting: Count = 256
    """Requests that may wait; more are turned away and may come again."""
    deadline_s: Positive = 120.0
    """What a request may wait and take, in seconds."""


class RewardServer(ThreadingHTTPServer):
    """A thread per connection, of which none does more than read and write: the service scores one at a time."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, settings: ServerSettings, service: RewardService, token: str | None):
        self.service, self.token = service, token
        self.max_body_bytes = settings.max_body_mib * 2**20
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock, self._free_bytes = threading.Lock(), MAX_BODIES * self.max_body_bytes
        self._said = (time.monotonic(), service.counts.line())
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port)[0]
            super().__init__((str(address[0]), settings.port), _Handler)
        except OSError as error:
            place = f"--host {settings.host} --port {settings.port}"
            raise UserError(f"{place}: cannot be listened at ({error.strerror or error}): choose another") from None

    @contextlib.contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """Takes `size` bytes of the memory for requests. Raises Refused where too many large ones are being held."""
        with self._lock:
            if size > self._free_bytes:
                raise Refused(503, "the reward server holds too many large requests")
            self._free_bytes -= size
        try:
            yield
        finally:
            with self._lock:
                self._free_bytes += size

    def process_request(self, request: Any, client_address: Any) -> None:
        """Turns a connection away where there are too many."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, from its own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is its own business; anything else is said in a line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"a request could not be handled: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def service_actions(self) -> None:
        """Says now and then what was done, when something was. Raises UserError where the reward hangs."""
        if self.service.busy_s > HANGS * self.service.limits.deadline_s:
            raise UserError(
                f"the reward has been at one request for {self.service.busy_s:.0f} s, {HANGS:g} times --deadline-s, "
                "and nothing can stop it: mend it, or raise --deadline-s, and start the server again"
            )
        said_s, last = self._said
        line = self.service.counts.line()
        if line != last and time.monotonic() - said_s >= STATUS_EVERY_S:
            self._said = (time.monotonic(), line)
            print(line, flush=True)

    def finish(self) -> None:
        """Lets the answers that are on their way go out, for a second at most."""
        for _ in range(MAX_CONNECTIONS):
            if not self._places.acquire(timeout=1.0):
                return


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    protocol_version = "HTTP/1.1"
    server: RewardServer

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._incoming = _Incoming(self.connection, HEADERS_S)
        self.rfile = io.BufferedReader(self._incoming)
        self._is_read = True

    def do_GET(self) -> None:
        """The server's state."""
        if not self._may_ask():
            return
        if self.path == "/health":
            self._answer(200, self.server.service.health())
        else:
            self._refuse(404, "no such address")

    def do_POST(self) -> None:
        """A request to check or score."""
        self._is_read = False
        if not self._may_ask():
            return
        try:
            size = self._size()
            with self.server.room_for(size):
                body = self._body(size)
                self._is_read = True
                answer = self.server.service.answer(self.path, body, self._is_gone)
            self._answer(200, answer)
        except Refused as refused:
            self._refuse(refused.status, str(refused))
        except Exception as error:
            self.server.handle_error(self.request, self.client_address)
            self._refuse(500, f"the reward server failed: {type(error).__name__}")

    def _may_ask(self) -> bool:
        """Whether the client knows the token; told so where it does not."""
        if self.server.token is None:
            return True
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode()):
            return True
        self._refuse(401, "the token is missing or wrong")
        return False

    def _size(self) -> int:
        """Bytes of the body that follows. Raises Refused where they are not stated, too many, or no JSON."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1:
            raise Refused(411, "one Content-Length is needed")
        if not (lengths[0].isascii() and lengths[0].isdigit()) or len(lengths[0]) > 15:
            raise Refused(400, "Content-Length is no number")
        # A web page can have a browser send any type but this one without asking the server first.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        if int(lengths[0]) > self.server.max_body_bytes:
            limit = f"--max-body-mib {self.server.max_body_bytes // 2**20}"
            raise Refused(413, f"{lengths[0]} bytes, more than {limit}")
        return int(lengths[0])

    def _body(self, size: int) -> bytes:
        """What was sent. Raises Refused where it ends early or is slow in coming."""
        self._incoming.allow(BODY_S)
        try:
            body = self.rfile.read(size)
        except TimeoutError:
            raise Refused(408, f"the request was not complete within {BODY_S:g} s") from None
        if len(body) < size:
            raise Refused(400, "the request ended early")
        return body

    def _is_gone(self) -> bool:
        """Whether the client has hung up; it sends nothing else while it waits."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _refuse(self, status: int, message: str) -> None:
        self.server.service.counts.add(refused=1)
        self._answer(status, {"error": message})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content, allow_nan=False).encode()
        self.close_connection = True
        self.connection.settimeout(SEND_S)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def finish(self) -> None:
        """Where a request was refused before it was read, reads on for a moment: a client that finds the connection
        cut while it still sends never sees the reason."""
        super().finish()
        if self._is_read:
            return
        ends = time.monotonic() + LINGER_S
        self.connection.shutdown(socket.SHUT_WR)
        while (remaining := ends - time.monotonic()) > 0:
            self.connection.settimeout(remaining)
            if not self.connection.recv(2**16):
                return

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request's first lines."""
        self._refuse(int(code), message or "no HTTP request")

    def version_string(self) -> str:
        """What answers call their server."""
        return "dgpo_fast"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the server counts requests, it does not list them."""


class _Incoming(io.RawIOBase):
    """What a client sends, with a deadline for all of it, however slowly it trickles in."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """Sets the deadline, from now."""
        self._ends_s = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._ends_s - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("too slow")
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)


def read_token(settings: ServerSettings) -> str | None:
    """The token that clients need, None where none is needed. Raises UserError where it must be and is not."""
    if settings.token_file is None:
        if not _is_loopback(settings.host):
            make = '`python -c "import secrets; print(secrets.token_hex())" > token.txt`'
            raise UserError(f"--host {settings.host}: others could reach the server, so it needs --token-file: {make}")
        return None
    try:
        token = Path(settings.token_file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {settings.token_file}: cannot be read ({error})") from None
    if len(token) < MIN_TOKEN_LENGTH or not token.isprintable() or " " in token:
        raise UserError(f"--token-file {settings.token_file}: needs one word of {MIN_TOKEN_LENGTH} letters or more")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(args: list[str]) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print_settings(USAGE, ServerSettings())
        return 0
    settings = resolve(ServerSettings(), parse_overrides(args, ServerSettings()), "command line")
    if not settings.reward:
        raise UserError("command line: no reward: name at least one, as in --reward ocr")
    token = read_token(settings)

    from dgpo_fast.rewards import load_rewards  # after the command line is known to be good

    limits = Limits(settings.max_images, int(settings.max_megapixels * 1e6), settings.max_waiting, settings.deadline_s)
    service = RewardService(load_rewards(settings.reward), limits)
    server = RewardServer(settings, service, token)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    host, port = server.server_address[:2]
    shown = f"[{host!s}]" if ":" in str(host) else str(host)
    print(f"serving {' '.join(settings.reward)} at http://{shown}:{port}{' with a token' if token else ''}", flush=True)
    try:
        server.serve_forever()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(BAD_INPUT)  # anything else would wait for the thread that hangs
    except KeyboardInterrupt:
        print("closing, once the request that is being scored is finished", flush=True)
    finally:
        server.server_close()
        service.close()
        server.finish()
    print(service.counts.line(), flush=True)
    return 0


def _stop(number: int, frame: object) -> None:
    """The first signal closes the server; the second one ends the process as it is."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt
