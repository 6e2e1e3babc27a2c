"""Servers for tests: the real reward server as a process, and servers that answer whatever a test wants."""

from __future__ import annotations

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

Answer = Callable[[str, bytes, Any], Any]


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
