"""uvicorn's HTTP/1.1 with bounds: on the bytes and the time of what comes before a body, and on the time in which a
client takes nothing of its answer. A client that would rather speak another protocol is answered in this one, one of
HTTP/1.0 without chunks. It knows no endpoints."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

__all__ = ["bounded_protocol"]

TOO_LARGE = "431 Request Header Fields Too Large"
TOO_SLOW = "408 Request Timeout"


class UnframedCycle(RequestResponseCycle):
    """A request of HTTP/1.0, which knows no chunks: where an answer has no length, the connection's end is its end.
    uvicorn closes the connection behind it, but would send it in chunks."""

    async def send(self, message: Any) -> None:
        """Send a part of the answer as it is."""
        self.chunked_encoding, self.expected_content_length = False, len(message.get("body", b""))
        await super().send(message)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `bounded_protocol` makes a subclass with other limits."""

    max_head_bytes = 32768
    seconds = 30.0
    _num_head_bytes = 0
    _num_empty_bytes = 0
    """That came behind a head and were no body: what chunks are framed in, and trailers."""
    _is_in_head = True
    _timer: asyncio.TimerHandle | None = None
    """Runs while a head is due."""
    _write_timer: asyncio.TimerHandle | None = None
    """Runs while the client leaves much of its answer unread."""
    _data = _again = b""
    """What is being read, and what is to be read once more."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; from now on its first request's head is due."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._cancel_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came. What is too large is refused before more of it is kept."""
        if self.timeout_keep_alive_task is not None:  # no request is under way: this must become one
            self._await_head()
        if self._is_in_head:
            self._num_head_bytes += len(data)
        else:
            self._num_empty_bytes += len(data)
        while data:
            self._data, self._again = data, b""
            super().data_received(data)
            data = self._again
        if max(self._num_head_bytes, self._num_empty_bytes) > self.max_head_bytes:
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._await_head()

    def _unsupported_upgrade_warning(self) -> None:
        """A head asked for another protocol (Java's client does, for HTTP/2), at which the parser stopped. It is to be
        read as one that does not ask, and what came behind it is its body."""
        (end,) = sys.exc_info()[1].args  # type: ignore[union-attr]
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self._again = b"\r\n".join(lines) + b"\r\n\r\n" + self._data[end:]
        self.parser = httptools.HttpRequestParser(self)

    def on_headers_complete(self) -> None:
        """A request's head is here."""
        if self._is_upgrade():
            return
        self._is_in_head, self._num_head_bytes, self._num_empty_bytes = False, 0, 0
        self._cancel_timer()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.max_head_bytes:
            self._refuse(TOO_LARGE)
            return
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            self.cycle.__class__ = UnframedCycle  # it is made in the call above, and starts later

    def on_body(self, body: bytes) -> None:
        """A part of a body came; that of a refused request is dropped."""
        self._num_empty_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has ended."""
        if not self._is_upgrade() and not self.transport.is_closing():
            super().on_message_complete()

    def _is_upgrade(self) -> bool:
        return bool(self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT")

    def pause_writing(self) -> None:
        """The client takes its answer more slowly than it is made."""
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size() + 1)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _await_reader(self, size: int) -> None:
        """Cut the connection unless less than `size` bytes are left to be sent, now and again after each time."""
        left = self.transport.get_write_buffer_size()
        if left < size:
            self._write_timer = self.loop.call_later(self.seconds, self._await_reader, left)
        else:
            self.transport.abort()

    def _await_head(self) -> None:
        self._is_in_head, self._num_empty_bytes = True, 0
        self._cancel_timer()
        self._timer = self.loop.call_later(self.seconds, self._refuse, TOO_SLOW)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: str) -> None:
        if not self.transport.is_closing():
            self.transport.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
            self.transport.close()


def bounded_protocol(max_head_bytes: int, seconds: float) -> type[BoundedProtocol]:
    """The protocol with these limits, for uvicorn to make connections of."""
    limits: dict[str, Any] = {"max_head_bytes": max_head_bytes, "seconds": seconds}
    return type("LimitedProtocol", (BoundedProtocol,), limits)
