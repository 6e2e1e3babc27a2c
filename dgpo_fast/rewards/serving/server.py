"""`python -m dgpo_fast.reward_server --reward NAME …`: rewards for runs on other machines, or in other environments.

JSON and PNG files over HTTP (see `rewards.remote` for the requests): nothing that comes in is ever executed. Without a
token only this machine may ask.
"""

import asyncio
import os
import socket
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config import STRICT, Count, Positive
from dgpo_fast.config.help import print_settings
from dgpo_fast.config.reading import parse_overrides, resolve
from dgpo_fast.errors import UserError
from dgpo_fast.rewards.remote.http_client import is_loopback
from dgpo_fast.rewards.serving.service import Limits, RewardService

USAGE = """Score pictures for runs on other machines or in other environments.

  python -m dgpo_fast.reward_server --reward ocr
  python -m dgpo_fast.reward_server --reward pickscore=1 aesthetic=0.2 --host 0.0.0.0 --token-file token.txt

In the run: --rewards http://HOST:PORT, with the token in the environment variable DGPO_REWARD_TOKEN."""

MIN_TOKEN_LENGTH = 16


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


def read_token(settings: ServerSettings) -> str | None:
    """The token that clients need, None where none is needed. Raises UserError where it must be and is not."""
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

    try:
        from dgpo_fast.rewards.serving.http_server import Server
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("h11", "starlette", "uvicorn"):
            raise
        install = 'pip install "dgpo_fast[server]"'
        raise UserError(f"python -m dgpo_fast.reward_server needs starlette and uvicorn: {install}") from None

    limits = Limits(settings.max_images, int(settings.max_megapixels * 1e6), settings.max_waiting, settings.deadline_s)
    service = RewardService(load_rewards(settings.reward), limits)
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    greeting = f"serving {' '.join(settings.reward)} at http://{shown}:{port}{' with a token' if token else ''}"
    server = Server(service, token, settings.max_body_mib * 2**20, greeting)
    asyncio.run(server.serve(sockets=[listener]))
    print(service.counts.line(), flush=True)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the first address of `host`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        place = f"--host {host} --port {port}"
        raise UserError(f"{place}: cannot be listened at ({error.strerror or error}): choose another") from None
    return listener
