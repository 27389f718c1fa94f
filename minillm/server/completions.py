"""POST /v1/completions: texts or token ids in, their continuations out, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from minillm.server.answers import timings_of, usage_of, with_timings
from minillm.server.protocol import CompletionRequest
from minillm.server.service import Choice, Service, abort_all, finish_all, merged, new_id
from minillm.server.stream import EventStream, while_connected

__all__ = ["completions_router"]

DEFAULT_MAX_TOKENS = 16


def completions_router(service: Service) -> APIRouter:
    """The endpoint for one model."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue one text or several."""
        service.check_model(body.model)
        params = body.sampling(
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens, logprobs=body.logprobs
        )
        prompts = await prompts_of(body, service)
        request_id = new_id("cmpl")
        choices = service.start(request_id, prompts, params, body)
        head = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }
        headers = {"X-Request-Id": request_id}
        if body.stream:
            return EventStream(events(body, service, choices, head), headers=headers)
        await while_connected(request, finish_all(choices))
        entries = [
            choice_entry(choice, echo_of(body, service, choice) + choice.text)
            | {"finish_reason": choice.finish_reason, "timings": timings_of(choice.timings)}
            for choice in choices
        ]
        answer = head | {"choices": entries, "usage": usage_of(choices)}
        return JSONResponse(with_timings(answer, choices), headers=headers)

    return router


async def prompts_of(body: CompletionRequest, service: Service) -> list[list[int]]:
    """The prompts as token ids. Raises RequestError."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [await service.encode(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [prompt]  # a list of numbers, as the protocol has checked
    service.check_num_prompts(len(prompt))
    return [await service.encode(each) if isinstance(each, str) else each for each in prompt]  # type: ignore[misc]


def echo_of(body: CompletionRequest, service: Service, choice: Choice) -> str:
    """The prompt as the text begins with it, if it is to."""
    return service.tokenizer.decode(choice.prompt) if body.echo else ""


def choice_entry(choice: Choice, text: str) -> dict[str, Any]:
    """One entry of `choices`."""
    return {"index": choice.index, "text": text, "logprobs": None}


async def events(
    body: CompletionRequest, service: Service, choices: Sequence[Choice], head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's objects; all is ended if the reader goes away."""
    echoes = {choice.index: echo_of(body, service, choice) for choice in choices}
    try:
        async for piece in merged(choices):
            choice, is_last = choices[piece.index], piece.is_last
            text = echoes.pop(piece.index, "") + piece.text
            if not text and not is_last:
                continue
            entry = choice_entry(choice, text) | {"finish_reason": piece.finish_reason}
            chunk = head | {"choices": [entry]}
            yield with_timings(chunk, [choice]) if is_last else chunk
        if body.wants_usage:
            yield with_timings(head | {"choices": [], "usage": usage_of(choices)}, choices)
    finally:
        abort_all(choices)
