"""POST /v1/chat/completions: a conversation in, its next message out, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from minillm.errors import RequestError
from minillm.server.answers import timings_of, usage_of, with_timings
from minillm.server.logprobs import chat_logprobs
from minillm.server.protocol import ChatRequest, NamedTool
from minillm.server.service import Choice, Piece, Service, abort_all, finish_all, merged, new_id
from minillm.server.stream import EventStream, while_connected
from minillm.server.tools import MAX_CALLS, ToolReader, call_schema
from minillm.types import FinishReason, StructuredOutputsParams, TokenScore

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
            **form_of(body),
        )
        tools = tools_of(body, service)
        prompt = await service.encode_chat(body.messages, tools)
        request_id = new_id("chatcmpl")
        choices = service.start(request_id, [prompt], params, body)
        head = {"id": request_id, "created": int(time.time()), "model": service.model_name}
        headers = {"X-Request-Id": request_id}
        readers = [reader_of(body, tools) for _ in choices]
        if body.stream:
            head |= {"object": "chat.completion.chunk"}
            return EventStream(events(body, service, choices, readers), head=head, headers=headers)
        await while_connected(request, finish_all(choices))
        entries = [
            entry_of(choice, reader) | {"logprobs": logprobs_of(body, service, choice.scores)}
            for choice, reader in zip(choices, readers, strict=True)
        ]
        answer = head | {"object": "chat.completion", "choices": entries, "usage": usage_of(choices)}
        return JSONResponse(with_timings(answer, choices), headers=headers)

    return router


def form_of(body: ChatRequest) -> dict[str, StructuredOutputsParams]:
    """The grammar that the answer is held to, if it is to have a certain form. Raises RequestError."""
    schema, wanted = None, body.response_format
    if body.tool_choice not in (None, "auto", "none"):
        if wanted is not None and wanted.type != "text":
            raise RequestError("response_format and a tool_choice that asks for a call exclude each other")
        name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
        schema = call_schema([tool.function.model_dump() for tool in body.tools or ()], name)
    elif wanted is not None and wanted.json_schema is not None:
        schema = wanted.json_schema.json_schema
    elif wanted is None or wanted.type == "text":
        return {}
    if "structured_outputs" in (body.model_extra or {}):
        raise RequestError("structured_outputs and response_format or tool_choice exclude each other")
    return {"structured_outputs": StructuredOutputsParams(json=schema, json_object=schema is None)}


def tools_of(body: ChatRequest, service: Service) -> list[dict[str, Any]] | None:
    """The tools that the model is told of. Raises RequestError if its template has no place for any."""
    if not body.tools or body.tool_choice == "none":
        return None
    if not service.tokenizer.has_tools:
        raise RequestError("tools are not supported: this model's chat template has no place for them")
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def reader_of(body: ChatRequest, tools: Sequence[Mapping[str, Any]] | None) -> ToolReader | None:
    """What finds calls in an answer; None if there are no tools."""
    if tools is None:
        return None
    most = 1 if body.parallel_tool_calls is False else MAX_CALLS
    return ToolReader([tool["function"]["name"] for tool in tools], most)


def reason_of(choice: Choice, calls: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a choice ended, in OpenAI's words."""
    return "tool_calls" if calls and choice.finish_reason is FinishReason.STOP else choice.finish_reason


def entry_of(choice: Choice, reader: ToolReader | None) -> dict[str, Any]:
    """One finished choice."""
    text, calls = choice.text, []
    if reader is not None:
        text = reader.feed(text) + reader.finish()
        calls = reader.calls
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    return {
        "index": choice.index,
        "message": message | ({"tool_calls": calls} if calls else {}),
        "finish_reason": reason_of(choice, calls),
        "timings": timings_of(choice.timings),
    }


def delta_of(piece: Piece, reader: ToolReader | None) -> dict[str, Any]:
    """What a stream's message gained with a piece."""
    text, calls = piece.text, []
    if reader is not None:
        text = reader.feed(text)
        if piece.finish_reason is not None:
            text += reader.finish()
            calls = [{"index": i} | call for i, call in enumerate(reader.calls)]
    return ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})


def logprobs_of(body: ChatRequest, service: Service, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    """Those of some tokens, if they were asked for."""
    return chat_logprobs(service.tokenizer, scores) if body.logprobs else None


async def events(
    body: ChatRequest,
    service: Service,
    choices: Sequence[Choice],
    readers: Sequence[ToolReader | None],
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's objects without what all have in common; all is ended if the reader goes away."""
    begun: set[int] = set()
    try:
        async for piece in merged(choices):
            choice, delta, is_last = choices[piece.index], delta_of(piece, readers[piece.index]), piece.is_last
            if not delta and not is_last and not body.logprobs:
                continue
            if piece.index not in begun:
                begun.add(piece.index)
                delta = {"role": "assistant", "content": ""} | delta
            reason = reason_of(choice, delta.get("tool_calls", ()))
            logprobs = logprobs_of(body, service, choice.scores[-len(piece.token_ids) :] if piece.token_ids else ())
            entry = {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            chunk = {"choices": [entry]}
            yield with_timings(chunk, [choice]) if is_last else chunk
        if body.wants_usage:
            yield with_timings({"choices": [], "usage": usage_of(choices)}, choices)
    finally:
        abort_all(choices)
