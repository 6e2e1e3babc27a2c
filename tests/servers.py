"""Servers for tests: the real reward server as a process, and servers that answer whatever a test wants."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from dgpo_fast.rewards.remote import png
from dgpo_fast.rewards.remote.http_client import JsonClient, Unanswered

Answer = Callable[[str, bytes, Any], Any]
TOKEN = "0123456789abcdef-token"
OWN_REWARDS = """
import threading, time

class Slow:
    "Takes its time, and would notice a second caller."
    def __init__(self):
        self.busy = threading.Lock()
    def __call__(self, images, prompts, metadata):
        assert self.busy.acquire(blocking=False), "two at a time"
        time.sleep(metadata[0].get("seconds", 0.0))
        self.busy.release()
        return images.mean((1, 2, 3))

def picky(images, prompts, metadata):
    if prompts[0] == "raise":
        raise RuntimeError("no score for this one")
    return [float(prompts[0])] * len(images)
"""


class Process:
    """`python -m dgpo_fast.reward_server` in a process of its own."""

    def __init__(self, *args: str, port: int = 0, folder: Path | None = None) -> None:
        command = [sys.executable, "-m", "dgpo_fast.reward_server", "--port", str(port), *args]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=dict(os.environ)
        )
        assert self.process.stdout
        self.first_line = self.process.stdout.readline()
        found = re.search(r"at (http://\S+:(\d+))", self.first_line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"no server: {self.first_line}{self.process.communicate()[1]}")
        self.url, self.port = found[1], int(found[2])

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.communicate()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Asks it to end; its exit status and what it said since it started."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors


@contextlib.contextmanager
def reward_server(*args: str, port: int = 0, folder: Path | None = None) -> Iterator[Process]:
    """The real server, killed at the end if it still runs."""
    server = Process(*args, port=port, folder=folder)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


@contextlib.contextmanager
def answering(answer: Answer, host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a server of this process: `answer(path, body, handler)` gives a value for JSON, raw bytes, a pair
    of status and value, or None after it has written what it likes itself."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(b"")

        def do_POST(self) -> None:
            self.reply(self.rfile.read(int(self.headers["Content-Length"])))

        do_PUT = do_POST

        def reply(self, body: bytes) -> None:
            content = answer(self.path, body, self)
            if content is None:
                return
            status, content = content if isinstance(content, tuple) else (200, content)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)

    server = Server((host, 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Returns when `condition` holds; fails where it does not in time."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.02)


def own_rewards(folder: Path) -> Path:
    """`folder` with rewards in own.py, and tokens in token.txt."""
    (folder / "own.py").write_text(OWN_REWARDS)
    (folder / "token.txt").write_text(f"{TOKEN}\n")
    return folder


@contextlib.contextmanager
def limited_server(folder: Path) -> Iterator[Process]:
    """A server with low limits, which must have nothing to say when it ends."""
    limits = ("--max-images", "8", "--max-megapixels", "1", "--max-body-mib", "4", "--max-waiting", "80")
    with reward_server("--reward", "slow=own:Slow", *limits, folder=folder) as running:
        yield running
        status, _, errors = running.stop()
        assert (status, errors) == (0, ""), "nothing that was sent surprised it"


def picture(value: int = 100, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def as_text(image: np.ndarray) -> str:
    return base64.b64encode(png.encode_png(image)).decode()


def request(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "metadata": {}, "images": [as_text(picture())], **changes}


def post(server: Process, body: Any, path: str = "/score") -> Any:
    """What the server answers, or its status and message."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        return JsonClient(server.url, attempts=1, deadline_s=20).post(path, data).content
    except Unanswered as error:
        return error.status, str(error)


def raw(server: Process, data: bytes, close: bool = True) -> bytes:
    """The answer to whatever is sent, to its end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def serves(server: Process) -> bool:
    return post(server, request())["scores"] == [100]
