"""Answers that end with their client: server-sent events as they come, and whole answers while somebody waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minillm.server.errors import error_body, response_of

__all__ = ["EventStream", "while_connected"]

Answer = TypeVar("Answer")
DONE = "[DONE]"
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of `work`, which is cancelled if the client goes away. Raises ClientDisconnect then."""
    await request.body()
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(client_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def event(data: str, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode("utf-8", "backslashreplace")


class EventStream(Response):
    """A stream of JSON objects as events. Its headers go out with the first one, so that what fails before it has a
    status of its own; what fails later is an event with an error.

    Each token of each stream comes this way: what all events have in common is encoded once."""

    def __init__(
        self,
        source: AsyncGenerator[dict[str, Any], None],
        *,
        head: dict[str, Any] | None = None,
        is_named: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`head`: fields that every object begins with, before those that the source gives. `is_named`: events carry
        their object's `type` as name, and none says that the stream is done."""
        super().__init__()
        self._common = ENCODER.encode(head)[:-1] + "," if head else "{"
        self._source, self._is_named = source, is_named
        self._head = [*HEADERS, *((k.encode(), v.encode()) for k, v in (headers or {}).items())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the source or the client has ended."""
        task = asyncio.ensure_future(self._send_all(scope, receive, send))
        gone = asyncio.ensure_future(client_gone(receive))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            await self._source.aclose()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False
        try:
            async for value in self._source:
                if not has_started:
                    await send({"type": "http.response.start", "status": 200, "headers": self._head})
                    has_started = True
                data = self._common + ENCODER.encode(value)[1:]
                await self._send_event(send, data, value["type"] if self._is_named else None)
        except (asyncio.CancelledError, OSError):
            raise
        except Exception as error:
            response = response_of(error)
            if not has_started:
                return await response(scope, receive, send)
            message = json.loads(bytes(response.body))["error"]["message"]
            failure = {"type": "error", **error_body(response.status_code, message)}
            await self._send_event(send, ENCODER.encode(failure), "error")
        if not self._is_named:
            await self._send_event(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_event(self, send: Send, data: str, name: str | None = None) -> None:
        body = event(data, name if self._is_named else None)
        await send({"type": "http.response.body", "body": body, "more_body": True})
