"""BodyLimit: no body larger, slower or more broken than the server agreed to. It knows no endpoints."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minillm.server.errors import error_response

__all__ = ["BodyLimit"]


class BodyLimit:
    """Reads a request's whole body before the application sees the request, and refuses it with 413 or 408."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with its body in one piece."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        too_large = error_response(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is larger than {self.max_bytes} bytes",
            headers={"Connection": "close"},
        )
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self.max_bytes:
            return await too_large(scope, receive, send)
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the body did not come within {self.seconds:g} seconds"
            slow = error_response(HTTPStatus.REQUEST_TIMEOUT, message, headers={"Connection": "close"})
            return await slow(scope, receive, send)
        if body is None:
            return await too_large(scope, receive, send)
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, None if it is too large; what came of it, if the client has gone."""
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(pieces)
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(pieces)
