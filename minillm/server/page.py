"""The page at `/`: static files, read once, under a policy that lets them load nothing from elsewhere. It knows no
engine: the page asks the endpoints like any client."""

from __future__ import annotations

from http import HTTPStatus
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from minillm.server.errors import ApiError

__all__ = ["page_router"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


def page_router() -> APIRouter:
    """The page and its files, which need no key."""
    router = APIRouter()
    folder = resources.files("minillm.server") / "static"
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}

    def answer(name: str) -> Response:
        if name not in files:
            raise ApiError(HTTPStatus.NOT_FOUND, "there is no such file")
        kind = TYPES[name[name.rindex(".") :]]
        return Response(files[name], headers={**HEADERS, "Content-Type": f"{kind}; charset=utf-8"})

    @router.get("/", include_in_schema=False, response_model=None)
    async def page() -> Response:
        """The page."""
        return answer("index.html")

    @router.get("/static/{name}", include_in_schema=False, response_model=None)
    async def file(name: str) -> Response:
        """A file of the page."""
        return answer(name)

    return router
