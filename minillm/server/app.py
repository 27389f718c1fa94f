"""The application: one model's endpoints behind the key check and the body limit. It knows no sockets or signals."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from minillm import __version__
from minillm.server.auth import KeyCheck
from minillm.server.chat import chat_router
from minillm.server.completions import completions_router
from minillm.server.errors import add_error_handlers
from minillm.server.insight import insight_router
from minillm.server.limits import BodyLimit
from minillm.server.page import page_router
from minillm.server.responses import responses_router
from minillm.server.service import Service
from minillm.server.status import status_router

__all__ = ["create_app"]


def create_app(service: Service, keys: Sequence[str] = ()) -> FastAPI:
    """The ASGI application. Without `keys` it answers everyone who reaches it by a local name.

    More endpoints: `app.include_router`. Each needs the key unless auth.py says that its path is open.
    """
    config = service.config
    app = FastAPI(title="MiniLLM", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(completions_router(service))
    app.include_router(chat_router(service))
    app.include_router(responses_router(service))
    app.include_router(status_router(service, __version__))
    app.include_router(insight_router(service))
    app.include_router(page_router())
    add_error_handlers(app)
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, seconds=config.receive_seconds)
    app.add_middleware(KeyCheck, keys=keys)  # added last: it sees a request first
    return app


class HeadAsGet:
    """Lets every path that knows GET answer HEAD: the application sees a GET, and the server, which keeps the request
    as it came, sends no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if is_head else scope, receive, send)
