"""Errors as clients see them: OpenAI's JSON and an HTTP status. Nothing of the server's inside gets out with them."""

from __future__ import annotations

import logging
import math
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from minillm.errors import BusyError, ClosingError, EngineError, RequestError
from minillm.server.protocol import FIELD_NAMES

__all__ = ["ApiError", "add_error_handlers", "error_response"]

LOG = logging.getLogger(__name__)
MAX_RETRY_AFTER = 600
MAX_MESSAGE = 1000
MAX_SHOWN_ERRORS = 5
MAX_PARAM = 256
CLIENT_GONE = 499
"""As nginx has it."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    return {"error": {"message": message[:MAX_MESSAGE], "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """The error as a response; characters that are no Unicode text become escapes."""
    message = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse(error_body(status, message, param, code), status, headers)


def response_of(error: Exception) -> JSONResponse:
    """The answer to a request that ended in `error`."""
    if isinstance(error, ApiError):
        return error_response(error.status, error.message, param=error.param, code=error.code)
    if isinstance(error, BusyError):
        retry_after = max(1, min(MAX_RETRY_AFTER, math.ceil(error.retry_after)))
        status = HTTPStatus.SERVICE_UNAVAILABLE if isinstance(error, ClosingError) else HTTPStatus.TOO_MANY_REQUESTS
        return error_response(status, str(error), headers={"Retry-After": str(retry_after)})
    if isinstance(error, RequestError):
        field = re.split(r"[ .]", str(error), maxsplit=1)[0]  # where a message begins with one
        return error_response(HTTPStatus.BAD_REQUEST, str(error), param=field if field in FIELD_NAMES else None)
    if isinstance(error, EngineError):
        return error_response(HTTPStatus.SERVICE_UNAVAILABLE, "the engine has stopped")
    LOG.error("a request failed", exc_info=error)
    return error_response(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed to answer this request")


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer with what went wrong."""
    return response_of(error)


async def answer_invalid(request: Request, error: Exception) -> Response:
    """Name the fields that are wrong, never what was in them."""
    assert isinstance(error, RequestValidationError)
    found = []
    for entry in error.errors()[:MAX_SHOWN_ERRORS]:
        where = ".".join(str(part) for part in entry["loc"] if part != "body")
        found.append((where, f"{where}: {entry['msg']}" if where else str(entry["msg"])))
    message = "; ".join(text for _, text in found)
    return error_response(HTTPStatus.BAD_REQUEST, message, param=found[0][0][:MAX_PARAM] or None, code="invalid_value")


async def answer_http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, and bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client has gone: nothing has failed, and nobody reads this."""
    return Response(status_code=CLIENT_GONE)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of this application is answered as OpenAI's clients expect."""
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    for kind in (ApiError, BusyError, RequestError, EngineError, Exception):
        app.add_exception_handler(kind, answer_error)
