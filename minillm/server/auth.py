"""Who may ask: keys compared in constant time, before anything else looks at a request. It knows no endpoints but
those that are open to all."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minillm.errors import ConfigError
from minillm.server.config import is_loopback
from minillm.server.errors import error_response

__all__ = ["KeyCheck", "read_keys"]

OPEN_PATHS = frozenset(("/", "/health", "/ready"))
OPEN_FOLDER = "/static/"
MIN_KEY_LENGTH = 8


def read_keys(path: Path | None, from_environment: str | None) -> list[str]:
    """The keys of a file, one a line, and that of the environment. Raises ConfigError."""
    keys = [from_environment.strip()] if from_environment else []
    if path is not None:
        try:
            keys += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
        if not keys:
            raise ConfigError(f"api_key_file {path} holds no key: put one on its first line")
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise ConfigError(f"a key must have at least {MIN_KEY_LENGTH} characters")
    return keys


def digest(key: bytes) -> bytes:
    """What is compared, of one length whatever the key's."""
    return hashlib.sha256(key).digest()


def is_open(scope: Scope) -> bool:
    """Whether a request needs no key: health, readiness and the page's files."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER))


class KeyCheck:
    """Passes on requests with a key. Without keys, those that were addressed to this machine by a local name, so that
    no web page can reach the server through a name of its own that leads here."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass on."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if self._digests:
                if not is_open(scope) and not self._is_known(headers.get("authorization", "")):
                    response = error_response(
                        HTTPStatus.UNAUTHORIZED,
                        "this server needs a key: send it as `Authorization: Bearer KEY`",
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
                    return await response(scope, receive, send)
            elif not is_local_name(headers.get("host", "")):
                message = "without a key this server answers only to localhost, 127.0.0.1 and [::1]"
                return await error_response(HTTPStatus.FORBIDDEN, message)(scope, receive, send)
        await self.app(scope, receive, send)

    def _is_known(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = digest(key.strip(" ").encode("latin-1", "replace"))
        matches = [hmac.compare_digest(given, known) for known in self._digests]  # all of them, whatever is found
        return scheme.lower() == "bearer" and any(matches)


def is_local_name(host: str) -> bool:
    """Whether a Host header names this machine.

    >>> is_local_name("localhost:8000"), is_local_name("[::1]:8000"), is_local_name("example.org")
    (True, True, False)
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return is_loopback(name.removeprefix("[").removesuffix("]"))
