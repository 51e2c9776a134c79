"""The server of the page: its routes, and starting it.

What it answers is the part of answers.py and jobs.py; who may ask, of guard.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from loopscope.errors import LoopscopeError
from loopscope.figures import STATIC
from loopscope.run.plain import inert
from loopscope.view.page.answers import Answers
from loopscope.view.page.guard import App, Guard
from loopscope.view.page.jobs import Jobs
from loopscope.view.page.refusal import Refusal, as_error
from loopscope.view.page.shelf import Shelf

HOST = "127.0.0.1"
PORT = 8765
"""Taken where nobody else has it."""

MOST_BYTES = 2**16
"""Of what is sent to the server at once."""

Plain = dict[str, Any]
Answer = Callable[..., Any]


@dataclass(frozen=True)
class Address:
    """Where the page is.

    Attributes:
        port: On this machine.
        token: Whoever has it may steer a live run.
    """

    port: int
    token: str

    def __str__(self) -> str:
        """To open in a browser."""
        return f"http://{HOST}:{self.port}/#token={self.token}"


def listen(port: int | None) -> socket.socket:
    """A socket of this machine alone.

    Args:
        port: Its number; 0: any that is free; `None`: 8765, or any if that is taken.

    Raises:
        OSError: The port is taken.
    """
    try:
        return _listen(PORT if port is None else port)
    except OSError:
        if port is not None:
            raise
        return _listen(0)


def _listen(port: int) -> socket.socket:
    # Named, since asyncio turns off delays only where it knows that it is TCP: an
    # answer in two parts would wait 40 ms for the other end.
    kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening = socket.socket(*kind)
    try:
        # A port whose last connections are still fading away is free.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(128)
    except BaseException:
        listening.close()
        raise
    return listening


def serve(
    root: Path, listening: socket.socket, token: str, ready: Callable[[], None]
) -> None:
    """Serve the page until the process is told to end (SIGINT, SIGTERM).

    Args:
        root: A run, or a folder with runs in it.
        listening: As `listen` gives it.
        token: For whoever may steer a live run.
        ready: Called once requests are answered.
    """
    import uvicorn

    config = uvicorn.Config(
        application(root, token, ready),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # A browser keeps its connections open; nobody waits for them at the end.
        timeout_graceful_shutdown=1,
        ws="none",
    )
    uvicorn.Server(config).run(sockets=[listening])


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(24)


def application(
    root: Path, token: str, ready: Callable[[], None] = lambda: None
) -> App:
    """The application, guard included."""
    answers = Answers(Shelf(root))
    jobs = Jobs(answers.shelf)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Called when the loop comes round again: requests are taken by then.
        asyncio.get_running_loop().call_later(0.05, ready)
        try:
            yield
        finally:
            await jobs.close()

    reads: dict[str, Answer] = {
        "runs": answers.runs,
        "run": answers.run,
        "status": answers.status,
        "curve": answers.curve,
        "epochs": answers.epochs,
        "signals": answers.signals,
        "events": answers.events,
        "checkpoints": answers.checkpoints,
        "job": jobs.job,
    }
    does: dict[str, Answer] = {
        "control": answers.control,
        "open": jobs.open,
        "compare": jobs.compare,
        "doctor": jobs.doctor,
        "cancel": jobs.cancel,
    }
    routes = [
        Route("/", _page),
        Route("/static/plotly.min.js", _plotly),
        Mount("/static", StaticFiles(directory=STATIC)),
        *(Route(f"/api/{name}", _asked(answer)) for name, answer in reads.items()),
        *(
            Route(f"/api/{name}", _told(answer), methods=["POST"])
            for name, answer in does.items()
        ),
    ]
    handlers: Any = {
        Refusal: _refused,
        HTTPException: _failed,
        LoopscopeError: _not_now,
        Exception: _broken,
    }
    return Guard(
        Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), token
    )


# Routes.


def _page(request: Request) -> Response:
    headers = {"Cache-Control": "no-cache"}
    return FileResponse(STATIC / "index.html", headers=headers)


def _plotly(request: Request) -> Response:
    found = find_spec("plotly")
    place = Path(found.origin).parent if found and found.origin else Path()
    file = place / "package_data" / "plotly.min.js"
    if not file.is_file():
        raise Refusal(
            404,
            "plotly is not installed.",
            "Install it: `pip install plotly`.",
            code="no_plotly",
        )
    headers = {"Cache-Control": "max-age=86400"}
    return FileResponse(file, media_type="text/javascript", headers=headers)


def _asked(answer: Callable[..., Any]) -> Callable[[Request], Any]:
    """A route that reads: its query has the arguments of `answer`."""

    async def route(request: Request) -> Response:
        query = request.query_params
        given = _arguments(answer, {n: v for n, v in query.items() if v != ""})
        return await _answered(answer, given)

    return route


def _told(answer: Callable[..., Any]) -> Callable[[Request], Any]:
    """A route that does something: its body has the arguments of `answer`."""

    async def route(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise Refusal(400, "The body is too long.", "Send one JSON object.")
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise Refusal(400, "The body is no JSON object.", "Send one JSON object.")
        return await _answered(answer, _arguments(answer, given))

    return route


async def _answered(answer: Callable[..., Any], given: Plain) -> Response:
    if inspect.iscoroutinefunction(answer):
        found = await answer(**given)
    else:
        found = await run_in_threadpool(answer, **given)
    return _json(found)


def _arguments(answer: Callable[..., Any], given: Plain) -> Plain:
    """What was given, as the kinds that `answer` takes.

    Raises:
        Refusal: Something is missing, or of another kind.
    """
    found: Plain = {}
    for name, parameter in inspect.signature(answer, eval_str=True).parameters.items():
        value = given.get(name)
        if value is None:
            if parameter.default is parameter.empty:
                raise Refusal(400, f"{name!r} is missing.", "docs/page.md has it.")
            continue
        if parameter.annotation in (int, int | None):
            value = _whole(name, value)
        elif not isinstance(value, str):
            raise Refusal(400, f"{name!r} is a text.", "docs/page.md has it.")
        found[name] = value
    return found


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        number = int(value)
        if abs(number) >= 2**53:
            raise ValueError
        return number
    except (ValueError, TypeError):
        raise Refusal(
            400,
            f"{name!r} is a whole number. Received: {str(value)[:40]!r}",
            "docs/page.md has it.",
        ) from None


# What is sent.


def _json(document: Any, status: int = 200) -> Response:
    return Response(inert(document), status, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _json(error.as_dict(), error.status)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{error.detail}: {request.url.path}"
    return _json(as_error(said, "docs/page.md"), error.status_code)


async def _not_now(request: Request, error: Exception) -> Response:
    do = "Ask again, or look at the run's folder."
    return _json(as_error(str(error), do, code="not_now"), 409)


async def _broken(request: Request, error: Exception) -> Response:
    said = f"{type(error).__name__}: {error}"
    return _json(as_error(said, "Look at the terminal.", code="broken"), 500)
