"""POST /v1/chat/completions: a conversation in, its next message out, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from minillm.server.answers import timings_of, usage_of, with_timings
from minillm.server.protocol import ChatRequest
from minillm.server.service import Choice, Service, abort_all, finish_all, merged, new_id
from minillm.server.stream import EventStream, while_connected

__all__ = ["chat_router"]


def chat_router(service: Service) -> APIRouter:
    """The endpoint for one model."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        limit = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        params = body.sampling(
            max_tokens=service.engine.info.limits.max_model_len if limit is None else limit,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        prompt = await service.encode_chat(body.messages)
        request_id = new_id("chatcmpl")
        choices = service.start(request_id, [prompt], params, body)
        head = {"id": request_id, "created": int(time.time()), "model": service.model_name}
        headers = {"X-Request-Id": request_id}
        if body.stream:
            return EventStream(events(body, choices, head), headers=headers)
        await while_connected(request, finish_all(choices))
        entries = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
                "timings": timings_of(choice.timings),
            }
            for choice in choices
        ]
        answer = head | {"object": "chat.completion", "choices": entries, "usage": usage_of(choices)}
        return JSONResponse(with_timings(answer, choices), headers=headers)

    return router


async def events(
    body: ChatRequest, choices: Sequence[Choice], head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's objects; all is ended if the reader goes away."""
    head = head | {"object": "chat.completion.chunk"}
    begun: set[int] = set()
    try:
        async for piece in merged(choices):
            is_last = piece.finish_reason is not None
            if not piece.text and not is_last:
                continue
            delta: dict[str, Any] = {} if piece.index in begun else {"role": "assistant", "content": ""}
            begun.add(piece.index)
            if piece.text:
                delta["content"] = piece.text
            entry = {
                "index": piece.index,
                "delta": delta,
                "logprobs": None,
                "finish_reason": piece.finish_reason,
            }
            chunk = head | {"choices": [entry]}
            yield with_timings(chunk, [choices[piece.index]]) if is_last else chunk
        if body.wants_usage:
            yield with_timings(head | {"choices": [], "usage": usage_of(choices)}, choices)
    finally:
        abort_all(choices)
