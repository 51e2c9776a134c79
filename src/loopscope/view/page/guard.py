"""Who may ask the page's server, and what its answers may do in a browser.

It listens on this machine only. What is left to keep out are pages of other sites that
are open in the same browser: a name that leads here (`Host`), a request made elsewhere
(`Origin`, `Sec-Fetch-Site`), and, where something is done, whoever has not been given
the token.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from loopscope.view.page.refusal import Refusal

HERE = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine. The port is free: a tunnel may end at another one."""

TOKEN = "x-loopscope-token"

READING = ("GET", "HEAD")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """Stands before an application.

    Args:
        app: The application.
        token: What whoever wants something done has to know.
    """

    def __init__(self, app: App, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with 403."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if scope["path"].startswith("/api/"):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        refused = self._refusal(scope)
        if refused is None:
            await self._app(scope, receive, guarded)
        else:
            answer = JSONResponse(refused.as_dict(), refused.status)
            await answer(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if len(headers.getlist("host")) != 1 or _name(host) not in HERE:
            return _refusal(f"This server is not {host!r}.", "other_host", host=host)
        if origin is not None and origin != f"http://{host}":
            said = f"A page of {origin!r} may not ask here."
            return _refusal(said, "other_site")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and scope["path"] != "/":
            return _refusal("A page of another site may not ask here.", "other_site")
        given = headers.get(TOKEN, "")
        if scope["method"] not in READING and not secrets.compare_digest(
            given.encode(), self._token.encode()
        ):
            said = "The token of the page's address is missing or wrong."
            return _refusal(said, "token")
        return None


def _refusal(error: str, code: str, **about: str) -> Refusal:
    open_page = "Open the page at the address that `loopscope view` has printed."
    return Refusal(403, error, open_page, code=code, **about)


def _name(host: str) -> str:
    """A `Host` without its port."""
    name, colon, port = host.rpartition(":")
    if colon and port.isascii() and port.isdigit():
        return name.lower()
    return host.lower()
