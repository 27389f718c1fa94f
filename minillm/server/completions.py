"""POST /v1/completions: texts or token ids in, their continuations out, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from minillm.server.answers import timings_of, usage_of, with_timings
from minillm.server.logprobs import completion_logprobs
from minillm.server.protocol import CompletionRequest
from minillm.server.service import Choice, Piece, Service, abort_all, finish_all, merged, new_id
from minillm.server.stream import EventStream, while_connected
from minillm.types import TokenScore

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
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
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
            return EventStream(events(body, service, choices), head=head, headers=headers)
        await while_connected(request, finish_all(choices))
        entries = [
            entry_of(body, service, choice, choice.whole, is_first=True) | {"timings": timings_of(choice.timings)}
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


def entry_of(
    body: CompletionRequest, service: Service, choice: Choice, piece: Piece, *, is_first: bool, start: int = 0
) -> dict[str, Any]:
    """An entry of `choices` with what a choice last gained; the first one begins with the prompt if that is echoed.

    `start`: characters of the tokens in the entries before, which is not where their text ends: some may be held back.
    """
    echo = service.tokenizer.decode(choice.prompt) if body.echo and is_first else ""
    entry: dict[str, Any] = {
        "index": choice.index,
        "text": echo + piece.text,
        "logprobs": None,
        "finish_reason": piece.finish_reason,
    }
    if body.logprobs is not None:
        tokens = piece.token_ids
        scores: list[TokenScore | None] = list(choice.scores[len(choice.token_ids) - len(tokens) :])
        if echo:
            tokens, scores = choice.prompt + tokens, choice.stream.prompt_scores + scores
        entry["logprobs"] = completion_logprobs(service.tokenizer, tokens, scores, start)
    return entry


async def events(
    body: CompletionRequest, service: Service, choices: Sequence[Choice]
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's objects without what all have in common; all is ended if the reader goes away."""
    ends: dict[int, int] = {}
    try:
        async for piece in merged(choices):
            choice, is_first, start = choices[piece.index], piece.index not in ends, ends.get(piece.index, 0)
            has_news = piece.text or (body.logprobs is not None and piece.token_ids) or (body.echo and is_first)
            if not has_news and not piece.is_last:
                continue
            entry = entry_of(body, service, choice, piece, is_first=is_first, start=start)
            ends[piece.index] = start + sum(map(len, (entry["logprobs"] or {}).get("tokens", ())))
            chunk = {"choices": [entry]}
            yield with_timings(chunk, [choice]) if piece.is_last else chunk
        if body.wants_usage:
            yield with_timings({"choices": [], "usage": usage_of(choices)}, choices)
    finally:
        abort_all(choices)
