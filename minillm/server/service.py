"""Service: a model as the endpoints use it: prompts in, completions as text out. It knows no HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import product
from typing import Any
from uuid import uuid4

from minillm.engine.async_engine import AsyncEngine, TokenStream
from minillm.engine.output import TextReader
from minillm.errors import RequestError
from minillm.server.config import ServerConfig
from minillm.server.errors import ApiError
from minillm.server.protocol import GenerationRequest, Message
from minillm.server.recent import RecentRequests
from minillm.text.tokenizer import Tokenizer
from minillm.types import MAX_SEED, FinishReason, SamplingParams, Timings, TokenScore, shown

__all__ = ["Choice", "Piece", "Service", "abort_all", "finish_all", "merged", "new_id"]

LONG_TEXT = 4096
"""Characters; longer texts are made into tokens, and more tokens into texts, on another thread."""
SHORT_MESSAGE = 16
"""Characters that take the time of a message without any."""


@dataclass(slots=True, kw_only=True)
class Piece:
    """What a choice gained: text that is certain, tokens, and at the end why it ended."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None

    @property
    def is_last(self) -> bool:
        """Whether the choice has ended."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class Choice:
    """One completion under way. `text` and `token_ids` grow with every `take`."""

    index: int
    prompt: list[int]
    stream: TokenStream
    reader: TextReader
    service: Service
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    async def take(self) -> Piece:
        """The next piece. Raises ApiError, RequestError if the request failed or timed out before its first token."""
        tokens = await self.stream.take()
        text, num_read = self.reader.read(tokens)
        if self.reader.is_matched:
            del tokens[num_read:]
            await self._stop()
        if self.stream.is_done:
            self.finish_reason = self._reason()
            if not self.reader.is_matched:
                text += self.reader.finish()
        self.text += text
        self.token_ids += tokens
        self.service.num_output_tokens += len(tokens)
        return Piece(index=self.index, text=text, token_ids=tokens, finish_reason=self.finish_reason)

    async def finish(self) -> None:
        """Take all there is."""
        while self.finish_reason is None:
            await self.take()

    def abort(self) -> None:
        """Its client has gone; free what it holds."""
        self.service.engine.finish(self.stream, FinishReason.ABORT)

    @property
    def whole(self) -> Piece:
        """All that it has, as one piece."""
        return Piece(index=self.index, text=self.text, token_ids=self.token_ids, finish_reason=self.finish_reason)

    @property
    def scores(self) -> Sequence[TokenScore]:
        """Of `token_ids`, if their logprobs were asked for."""
        return self.stream.scores[: len(self.token_ids)]

    @property
    def timings(self) -> Timings:
        """Where the time went; complete once it has ended."""
        assert self.stream.ending is not None
        return self.stream.ending.timings.of_tokens(len(self.token_ids))

    async def _stop(self) -> None:
        """A stop string is there: end the request; what it gained meanwhile is dropped."""
        self.service.engine.finish(self.stream, FinishReason.STOP)
        while not self.stream.is_done:
            await self.stream.take()

    def _reason(self) -> FinishReason:
        ending = self.stream.ending
        assert ending is not None
        if self.reader.is_matched:
            return FinishReason.STOP
        if self.stream.is_expired:
            if not self.stream.num_tokens:
                raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "the request's time was over before it began to answer")
            return FinishReason.ABORT
        if ending.reason is FinishReason.REJECTED:
            raise RequestError(ending.error)
        if ending.reason is FinishReason.ERROR:
            params = self.stream.submission.params
            limits = params.allowed_token_ids, params.structured_outputs
            if limits != (None, None) or params.bad_words or params.min_tokens:
                message = (
                    "no token was left to choose: allow more by allowed_token_ids, bad_words, min_tokens or "
                    "structured_outputs"
                )
                raise ApiError(HTTPStatus.BAD_REQUEST, message)
            raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the engine failed at this request")
        return ending.reason


class Service:
    """A tokeniser and an engine."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, model_name: str, config: ServerConfig) -> None:
        self.engine, self.tokenizer, self.model_name, self.config = engine, tokenizer, model_name, config
        self.created = int(time.time())
        self.recent = RecentRequests()
        self.num_output_tokens = 0
        """Of all answers, as their usage has them: the engine's count has those behind a stop string too."""

    def check_model(self, model: str | None) -> None:
        """Raise ApiError unless this is the model that is served; None is."""
        if model is not None and model != self.model_name:
            message = f"the model {model!r} does not exist; this server has {self.model_name!r}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises RequestError."""
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        if len(tokens) < LONG_TEXT:
            return self.tokenizer.decode(tokens, skip_special_tokens=False)
        return await asyncio.to_thread(self.tokenizer.decode, tokens, skip_special_tokens=False)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation. Raises RequestError."""

        def encode() -> list[int]:
            plain = [as_template_message(message) for message in messages]
            return self.tokenizer.encode_chat(plain, tools=tools, add_generation_prompt=add_generation_prompt)

        is_short = not tools and sum(SHORT_MESSAGE + len(message.text or "") for message in messages) < LONG_TEXT
        return encode() if is_short else await asyncio.to_thread(encode)

    def check_num_prompts(self, num: int) -> None:
        """Raise RequestError if a request may not have so many prompts."""
        if not 1 <= num <= self.config.max_prompts:
            raise RequestError(f"prompt may hold 1 to {self.config.max_prompts} prompts, not {num}")

    def start(
        self, request_id: str, prompts: Sequence[list[int]], params: SamplingParams, body: GenerationRequest
    ) -> list[Choice]:
        """Queue every completion of a request, `n` of each prompt, or none.

        Raises RequestError, BusyError, ClosingError, EngineError.
        """
        n, config = body.n or 1, self.config
        self.check_num_prompts(len(prompts))
        if n > config.max_n:
            raise RequestError(f"n may be at most {config.max_n}, not {shown(n)}")
        if len(prompts) * n > config.max_choices:
            raise RequestError(f"prompts times n may be at most {config.max_choices}, not {len(prompts) * n}")
        params = params if n == params.n else replace(params, n=n)
        for prompt in prompts:
            self.engine.info.check(prompt, params)
        user = body.user or ""
        self.engine.check_room(user, len(prompts) * n)
        choices: list[Choice] = []
        for prompt, part in product(prompts, parts_of(params, max(1, self.engine.info.limits.max_num_seqs // 2))):
            streams = self.engine.submit(
                prompt,
                part,
                priority=body.priority or 0,
                user=user,
                salt=(body.cache_salt or "").encode("utf-8", "backslashreplace"),
                is_streamed=bool(body.stream),
                timeout=min(body.timeout or config.request_seconds, config.request_seconds),
            )
            choices += [self._choice(len(choices) + i, prompt, stream) for i, stream in enumerate(streams)]
        self.recent.add(request_id, [choice.stream for choice in choices])
        return choices

    def _choice(self, index: int, prompt: list[int], stream: TokenStream) -> Choice:
        params = stream.submission.params
        stop_token_ids = self.engine.info.stop_token_ids(params)
        reader = TextReader(self.tokenizer, prompt, params.stop_strings, stop_token_ids, params.min_tokens)
        return Choice(index=index, prompt=prompt, stream=stream, reader=reader, service=self)


def parts_of(params: SamplingParams, most: int) -> list[SamplingParams]:
    """Parameters of `n` completions as several of at most so many each, between which others have their turn."""
    if params.n <= most:
        return [params]
    seed = params.seed
    return [
        replace(params, n=min(most, params.n - i), seed=None if seed is None else (seed + i) % (MAX_SEED + 1))
        for i in range(0, params.n, most)
    ]


def new_id(prefix: str) -> str:
    """An id that nobody chose and nobody can guess."""
    return f"{prefix}-{uuid4().hex}"


def as_template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates know it: content is text, arguments of calls are objects."""
    plain = message.model_dump(exclude_none=True, exclude={"annotations"})
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = message.text or ""
    for call in plain.get("tool_calls", ()):
        with suppress(ValueError, RecursionError):  # what is no JSON stays text
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return plain


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[Piece, None]:
    """Pieces of all choices as they come."""
    if len(choices) == 1:
        while choices[0].finish_reason is None:
            yield await choices[0].take()
        return
    tasks = {asyncio.ensure_future(choice.take()): choice for choice in choices}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in tasks if task in done]:
                choice = tasks.pop(task)
                yield task.result()
                if choice.finish_reason is None:
                    tasks[asyncio.ensure_future(choice.take())] = choice
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


async def finish_all(choices: Sequence[Choice]) -> None:
    """Wait for every choice. Whatever happens, none is left running."""
    try:
        async for _ in merged(choices):
            pass
    finally:
        abort_all(choices)


def abort_all(choices: Sequence[Choice]) -> None:
    """End what has not ended."""
    for choice in choices:
        choice.abort()
