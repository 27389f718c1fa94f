"""uvicorn's HTTP/1.1 with a bound on what comes before a body: its bytes and its time. It knows no endpoints."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["bounded_protocol"]

TOO_LARGE = "431 Request Header Fields Too Large"
TOO_SLOW = "408 Request Timeout"


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `bounded_protocol` makes a subclass with other limits."""

    max_head_bytes = 32768
    head_seconds = 30.0
    _num_head_bytes = 0
    _num_empty_bytes = 0
    """That came behind a head and were no body: what chunks are framed in, and trailers."""
    _is_in_head = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; from now on its first request's head is due."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came. What is too large is refused before more of it is kept."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
        else:
            self._num_empty_bytes += len(data)
        super().data_received(data)
        if max(self._num_head_bytes, self._num_empty_bytes) > self.max_head_bytes:
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """A request's head is here."""
        self._is_in_head, self._num_head_bytes, self._num_empty_bytes = False, 0, 0
        self._cancel_timer()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.max_head_bytes:
            self._refuse(TOO_LARGE)
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body came; that of a refused request is dropped."""
        self._num_empty_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has ended."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def _await_head(self) -> None:
        self._is_in_head, self._num_empty_bytes = True, 0
        self._cancel_timer()
        self._timer = self.loop.call_later(self.head_seconds, self._refuse, TOO_SLOW)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: str) -> None:
        if not self.transport.is_closing():
            self.transport.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
            self.transport.close()


def bounded_protocol(max_head_bytes: int, head_seconds: float) -> type[BoundedProtocol]:
    """The protocol with these limits, for uvicorn to make connections of."""
    limits: dict[str, Any] = {"max_head_bytes": max_head_bytes, "head_seconds": head_seconds}
    return type("LimitedProtocol", (BoundedProtocol,), limits)
