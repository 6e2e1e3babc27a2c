"""`python -m dgpo_fast.reward_server --reward NAME …`: rewards for runs on other machines, or in other environments.

JSON and PNG files over HTTP (see `rewards.remote` for the requests): nothing in a request is executed. Without a token,
only this machine can send requests.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, Positive
from dgpo_fast.config.help import print_settings
from dgpo_fast.config.reading import parse_overrides, resolve
from dgpo_fast.errors import UserError
from dgpo_fast.rewards.remote.http_client import is_loopback
from dgpo_fast.rewards.serving.service import Limits, RewardService

USAGE = """Score images for training runs on other machines or in other Python environments.

  python -m dgpo_fast.reward_server --reward ocr
  python -m dgpo_fast.reward_server --reward pickscore=1 aesthetic=0.2 --host 0.0.0.0 --token-file token.txt

In the run, use --rewards http://HOST:PORT, with the token in the environment variable DGPO_REWARD_TOKEN."""

MIN_TOKEN_LENGTH = 16


@dataclass(kw_only=True, config=STRICT)
class ServerSettings:
    """A reward server."""

    reward: tuple[str, ...] = ()
    """Rewards that score the images, as in a run's `--rewards`: names, `module:attribute`, or judges' files, each
    with an optional weight (`NAME=0.5`)."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address that other machines can reach needs `token_file`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on. 0: any free port."""
    token_file: str | None = None
    """File with the token that clients must send, at least 16 characters. None: only this machine can send requests."""
    max_images: Count = 256
    """Maximum number of images per request."""
    max_megapixels: Positive = 64.0
    """Maximum number of pixels of all images of a request, in millions."""
    max_body_mib: Count = 128
    """Maximum size of a request, in MiB."""
    max_waiting: Count = 256
    """Maximum number of requests in the queue. Further requests are refused; clients try again later."""
    deadline_s: Positive = 120.0
    """Seconds from a request's arrival within which it must be scored; after that it is refused."""


def read_token(settings: ServerSettings) -> str | None:
    """The token that clients need, None if none is needed. Raises UserError if one is needed and missing."""
    if settings.token_file is None:
        if not is_loopback(settings.host):
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

    with needs_server("reward_server"):
        from dgpo_fast.rewards.serving.http_server import Server

    limits = Limits(settings.max_images, int(settings.max_megapixels * 1e6), settings.max_waiting, settings.deadline_s)
    service = RewardService(load_rewards(settings.reward), limits)
    listener = listen(settings.host, settings.port, f"--host {settings.host} --port {settings.port}")
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    greeting = f"serving {' '.join(settings.reward)} at http://{shown}:{port}{' with a token' if token else ''}"
    server = Server(service, token, settings.max_body_mib * 2**20, greeting)
    asyncio.run(server.serve(sockets=[listener]))
    print(service.counts.line(), flush=True)
    return 0


@contextmanager
def needs_server(command: str) -> Iterator[None]:
    """Imports of the HTTP libraries. Raises UserError, which names the command, if they are not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("h11", "starlette", "uvicorn"):
            raise
        install = 'pip install "dgpo_fast[server]"'
        raise UserError(f"python -m dgpo_fast.{command} needs starlette and uvicorn: {install}") from None


def listen(host: str, port: int, setting: str) -> socket.socket:
    """A socket at the first address of `host`. Raises UserError, which begins with `setting`, if there is none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise UserError(f"{setting}: cannot listen there ({error.strerror or error}): choose another") from None
    return listener
