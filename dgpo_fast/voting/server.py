"""The page's server: what each address answers. Only this machine reaches it, with the token that the addresses have.

The token keeps other users of the machine and other pages of the browser out; the Host header must name this machine,
so that no foreign name can be pointed here.
"""

import asyncio
import hmac
import json
import signal
import socket
import statistics
import time
from collections.abc import Sequence
from types import FrameType
from typing import cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dgpo_fast.records import JsonObject
from dgpo_fast.run.console import duration
from dgpo_fast.voting.drawing import GroupDrawing
from dgpo_fast.voting.folder import STARS, Said, Vote, VoteFolder

HOSTS = ("127.0.0.1", "localhost")
MAX_BODY_BYTES = 10_000
LATEST = 20
"""Votes by which the time that the others take is estimated."""
LONGEST_S = 120.0
"""Seconds for one vote; more is a break."""
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Session:
    """One person at the page.

    Args:
        folder: keeps the votes.
        drawing: of the groups.
        ask: what the page asks at first.
        train: the command that trains on the votes.
    """

    def __init__(self, folder: VoteFolder, drawing: GroupDrawing, ask: str, train: str):
        self.folder, self.drawing, self.ask, self.train = folder, drawing, ask, train
        self._last_s: float | None = None  # until the first group is shown
        self._took_s: list[float] = []

    def state(self) -> JsonObject:
        """All that the page shows."""
        folder, drawn, total = self.folder, self.drawing.drawn, len(self.folder.prompts)
        open_groups = [group for group in range(drawn) if group not in folder.votes]
        took_s = statistics.median(self._took_s) if self._took_s else None
        left_s = self.drawing.left_s
        if open_groups and self._last_s is None:
            self._last_s = time.monotonic()
        return {
            "ask": self.ask,
            "total": total,
            "drawn": drawn,
            "voted": len(folder.votes),
            "skipped": len(folder.votes) - folder.judged(),
            "voting_left": None if took_s is None else duration(took_s * (total - len(folder.votes))),
            "drawing_left": None if left_s is None else duration(left_s),
            "fault": self.drawing.fault,
            "group": self._shown(open_groups[0]) if open_groups else None,
            "next": self._pictures(open_groups[1]) if len(open_groups) > 1 else [],
            "folder": str(folder.path),
            "train": self.train,
        }

    def vote(self, given: object) -> None:
        """Keeps what the page sends. Raises HTTPException if it is no vote on a group that waits for one."""
        if not isinstance(given, dict):
            raise HTTPException(400, "no JSON object")
        group, said, values = given.get("group"), given.get("said"), given.get("values")
        highest = {"rank": self.folder.group_size, "rating": STARS}.get(said) if isinstance(said, str) else None
        wanted = 0 if said == "skip" else self.folder.group_size
        if not isinstance(values, list) or len(values) != wanted or not (said == "skip" or highest):
            raise HTTPException(400, "no vote")
        if any(type(value) is not int or not 1 <= value <= (highest or 0) for value in values):
            raise HTTPException(400, "no vote")
        if type(group) is not int or not 0 <= group < self.drawing.drawn or group in self.folder.votes:
            raise HTTPException(409, "another window has voted on this group")
        self.folder.add(Vote(group, cast(Said, said), tuple(values)))
        self._time()

    def undo(self) -> None:
        """Takes the last vote back."""
        self.folder.undo()
        self._took_s = self._took_s[:-1]

    def _time(self) -> None:
        now_s = time.monotonic()
        took_s = now_s - (now_s if self._last_s is None else self._last_s)
        self._took_s = [*self._took_s, min(took_s, LONGEST_S)][-LATEST:]
        self._last_s = now_s

    def _shown(self, group: int) -> JsonObject:
        return {"number": group, "prompt": self.folder.prompts[group].text, "pictures": self._pictures(group)}

    def _pictures(self, group: int) -> Sequence[str]:
        return [f"pictures/{number}.png" for number in self.folder.numbers(group)]


def application(session: Session, page: str, token: str) -> Starlette:
    """What each address answers; all of them begin with the token."""

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    async def state(request: Request) -> Response:
        return JSONResponse(session.state(), headers=HEADERS)

    async def vote(request: Request) -> Response:
        session.vote(await _body(request))
        return await state(request)

    async def undo(request: Request) -> Response:
        session.undo()
        return await state(request)

    async def picture(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= session.drawing.drawn * session.folder.group_size:
            raise HTTPException(404)
        headers = {**HEADERS, "Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(session.folder.picture(number), media_type="image/png", headers=headers)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return PlainTextResponse(error.detail, error.status_code, headers=HEADERS)

    app = Starlette(
        routes=[
            Route("/{token}/", show, methods=["GET"]),
            Route("/{token}/state", state, methods=["GET"]),
            Route("/{token}/pictures/{number:int}.png", picture, methods=["GET"]),
            Route("/{token}/vote", vote, methods=["POST"]),
            Route("/{token}/undo", undo, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS), Middleware(_Gate, token=token)],
        exception_handlers={HTTPException: refuse},
    )
    app.router.redirect_slashes = False
    return app


async def _body(request: Request) -> object:
    """The JSON that was sent. Raises HTTPException if it is none, or longer than any vote."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, "longer than any vote")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "no JSON") from None


class _Gate:
    """Answers addresses without the token as if there were nothing."""

    def __init__(self, app: ASGIApp, token: str):
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = scope["path"].removeprefix("/").partition("/")[0] if scope["type"] == "http" else ""
        if hmac.compare_digest(given.encode(), self._token):
            await self._app(scope, receive, send)
        else:
            await PlainTextResponse("Not Found", 404, headers=HEADERS)(scope, receive, send)


class _Server(uvicorn.Server):
    """Serves until a signal."""

    def __init__(self, app: Starlette):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=2,
                log_config=None,
                log_level="critical",
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal closes the server; the second one ends the process as it is."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        self.should_exit = True


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serves until Ctrl-C, or a kill."""
    asyncio.run(_Server(app).serve(sockets=[listener]))
