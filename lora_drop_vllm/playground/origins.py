"""Keeps other sites' pages away from the playground, and foreign content out of its own page.

A page of another site that is open in the same browser could otherwise send requests here, or give
its own name this machine's address.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class OwnPagesOnly:
    """Refuses requests under another name or from another site's page; adds `HEADERS`.

    Args:
        hosts: names, without a port, that a browser may use; None for any
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        name = urlsplit(f"//{host}").hostname
        if self.hosts is not None and name not in self.hosts:
            refusal = PlainTextResponse("this playground has another address", 421)
            return await refusal(scope, receive, send)
        if origin is not None and urlsplit(origin).netloc != host:
            refusal = PlainTextResponse("requests of other sites' pages are refused", 403)
            return await refusal(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers)
