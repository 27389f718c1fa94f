"""ServerClient: conversations with a server that speaks OpenAI's API, by the standard library alone."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from http.client import HTTPException, HTTPResponse
from typing import Any

from minillm.errors import ConfigError, RequestError
from minillm.types import FinishReason, RequestOutput, SamplingParams, Timings

__all__ = ["ServerClient", "events_in", "parts_of"]

CONNECT_SECONDS = 600.0
DEFAULTS = SamplingParams()
REASONS = {str(reason): reason for reason in FinishReason}
"""Those that this package has too; any other is a stop."""


@dataclass(slots=True, kw_only=True)
class Chunk:
    """A piece of an answer; the whole comes with the last one."""

    text: str
    output: RequestOutput | None = None


class ServerClient:
    """One server and its first model."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url`: with or without /v1. Raises ConfigError if no server answers there."""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"url must begin with http:// or https://, not {url!r}")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            with self._open("models", None) as response:
                self.model = str(json.load(response)["data"][0]["id"])
        except (RequestError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{url} is no server of a model: {error}") from error

    def stream(self, messages: Sequence[dict[str, Any]], params: SamplingParams) -> Iterator[Chunk]:
        """The next message of a conversation; times are those of this end of the wire. Raises RequestError."""
        values = {field.name: getattr(params, field.name) for field in fields(SamplingParams)}
        given = {name: value for name, value in values.items() if value != getattr(DEFAULTS, name)}
        body = {"model": self.model, "messages": list(messages), "stream": True} | given
        body["stream_options"] = {"include_usage": True}
        timings, text, reason = Timings(arrival=time.monotonic()), "", FinishReason.STOP
        num_tokens = 0
        with self._open("chat/completions", body) as response:
            for event in events_in(response):
                piece, why, usage = parts_of(event)
                reason = REASONS.get(why, reason)
                if usage is not None:
                    num_tokens, timings.num_prompt_tokens, timings.num_cached_tokens = usage
                if piece:
                    timings.token_times.append(time.monotonic())
                    text += piece
                    yield Chunk(text=piece)
        timings.finished = time.monotonic()
        yield Chunk(
            text="",
            output=RequestOutput(
                request_id="0",
                prompt_token_ids=[],
                text=text,
                token_ids=[0] * num_tokens,  # a server tells how many there were, not which
                finish_reason=reason,
                timings=timings,
                completions=[],
            ),
        )

    def _open(self, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        """Send a request. Raises RequestError with what the server says, or why none was reached."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{path}", data=data, headers=self._headers)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=CONNECT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise RequestError(message_of(error.read(), error.code)) from error
        except (OSError, HTTPException) as error:
            raise RequestError(f"{self._url} cannot be reached: {error}") from error
        return response


def events_in(response: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a stream. Raises RequestError for one that says what failed, and if the stream breaks off."""
    with suppress(OSError, HTTPException):
        for line in response:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if line.startswith(b"data:"):
                yield object_in(data)
    raise RequestError("the server broke off in the middle of its answer")


def object_in(data: bytes) -> dict[str, Any]:
    """The object of an event. Raises RequestError."""
    try:
        event = json.loads(data)
        error = event.get("error")
    except (ValueError, AttributeError) as failure:
        raise RequestError(f"the server's answer holds what is no JSON object: {failure}") from failure
    if error:
        raise RequestError(str(error.get("message", error) if isinstance(error, dict) else error))
    return dict(event)


def parts_of(event: dict[str, Any]) -> tuple[str, str, tuple[int, int, int] | None]:
    """Text, why it ended, how many tokens came, were in the prompt and of those in the cache. Raises RequestError."""
    try:
        choice, usage = (event.get("choices") or [{}])[0], event.get("usage")
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if usage:
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            nums = usage.get("completion_tokens"), usage.get("prompt_tokens"), cached
            usage = tuple(int(num or 0) for num in nums)
        return str(text), str(choice.get("finish_reason") or ""), usage or None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"the server's answer has not the form of OpenAI's: {error}") from error


def message_of(content: bytes, status: int) -> str:
    """What a server says of an error."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answered with status {status}"
