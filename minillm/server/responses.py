"""POST /v1/responses: OpenAI's newer endpoint, text in and text out, whole or as named events. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from minillm.server.answers import timings_of, usage_of
from minillm.server.protocol import ResponsesRequest
from minillm.server.service import Choice, Service, abort_all, finish_all, merged, new_id
from minillm.server.stream import EventStream, while_connected
from minillm.types import FinishReason

__all__ = ["responses_router"]


def responses_router(service: Service) -> APIRouter:
    """The endpoint for one model."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer a text or a conversation."""
        service.check_model(body.model)
        limit = body.max_output_tokens
        max_tokens = service.engine.info.limits.max_model_len if limit is None else limit
        params = body.sampling(max_tokens=max_tokens)
        prompt = await service.encode_chat(body.messages)
        response_id = new_id("resp")
        answer = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model_name,
            "instructions": body.instructions,
            "max_output_tokens": limit,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "metadata": {},
            "error": None,
            "incomplete_details": None,
            "store": False,
        }
        (choice,) = service.start(response_id, [prompt], params, body)
        headers = {"X-Request-Id": response_id}
        if body.stream:
            return EventStream(numbered(events(choice, answer)), is_named=True, headers=headers)
        await while_connected(request, finish_all([choice]))
        return JSONResponse(finished(choice, answer, new_id("msg")), headers=headers)

    return router


def message_of(item_id: str, text: str, status: str) -> dict[str, Any]:
    """The output's one message."""
    content = [] if status == "in_progress" else [part_of(text)]
    return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def part_of(text: str) -> dict[str, Any]:
    """The message's one part."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def finished(choice: Choice, answer: dict[str, Any], item_id: str) -> dict[str, Any]:
    """The whole response."""
    is_complete = choice.finish_reason is FinishReason.STOP
    status = "completed" if is_complete else "incomplete"
    reason = "max_output_tokens" if choice.finish_reason is FinishReason.LENGTH else choice.finish_reason
    usage = usage_of([choice])
    return answer | {
        "status": status,
        "incomplete_details": None if is_complete else {"reason": reason},
        "output": [message_of(item_id, choice.text, status)],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
        "timings": timings_of(choice.timings),
    }


async def numbered(source: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    """Events with their places in the stream."""
    number = 0
    try:
        async for value in source:
            yield value | {"sequence_number": number}
            number += 1
    finally:
        await source.aclose()


async def events(choice: Choice, answer: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's events in OpenAI's order; the request is ended if the reader goes away."""
    item_id = new_id("msg")
    place = {"item_id": item_id, "output_index": 0, "content_index": 0}
    begun = answer | {"status": "in_progress", "output": [], "usage": None}
    try:
        pieces = merged([choice])
        piece = await anext(pieces)  # so that a request that fails at once has a status of its own
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        item = message_of(item_id, "", "in_progress")
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield {"type": "response.content_part.added", "part": part_of("")} | place
        while True:
            if piece.text:
                yield {"type": "response.output_text.delta", "delta": piece.text, "logprobs": []} | place
            if piece.is_last:
                break
            piece = await anext(pieces)
        whole = finished(choice, answer, item_id)
        yield {"type": "response.output_text.done", "text": choice.text, "logprobs": []} | place
        yield {"type": "response.content_part.done", "part": part_of(choice.text)} | place
        yield {"type": "response.output_item.done", "output_index": 0, "item": whole["output"][0]}
        yield {"type": f"response.{whole['status']}", "response": whole}
    finally:
        abort_all([choice])
