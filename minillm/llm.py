"""LLM: the offline API. Text, token ids or chat messages in; texts, tokens and timings out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minillm.config import EngineConfig
from minillm.engine.beams import BeamRun
from minillm.engine.collector import sparing_what_is_there
from minillm.engine.interrupts import interrupts_deferred
from minillm.engine.launch import DEFAULT_MODEL, launch
from minillm.engine.output import TextStream, beam_output
from minillm.errors import ConfigError, RequestError
from minillm.types import (
    BeamSearchOutput,
    BeamSearchParams,
    FinishReason,
    RequestOutput,
    SamplingParams,
    as_int,
    check_priority,
    shown,
)

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(slots=True, kw_only=True)
class StreamChunk:
    """A piece of a stream: new text and tokens; the whole output comes with the last one."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    output: RequestOutput | None


class LLM:
    """A model, ready to generate. Threads may share it: whoever has the turn advances what all have asked for.

    llm = LLM("smollm2")
    for out in llm.generate(["The capital of France is"], SamplingParams(max_tokens=32)):
        print(out.text, out.timings)
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, **options: Any) -> None:
        """`model`: smollm2, a folder, a .gguf file, a hub id or random:NAME. `options`: fields of EngineConfig.

        Raises TypeError for an unknown option; ConfigError, ModelNotFoundError, CheckpointError, DownloadError.
        """
        if not isinstance(model, (str, Path)):
            raise ConfigError(f"model must be a name or a path, not {shown(model)}")
        self.config = EngineConfig(**options)
        launched = launch(str(model), self.config)
        self.engine, self._runner = launched.engine, launched.runner
        self.tokenizer, self.model_config = launched.tokenizer, launched.model_config
        self._streams: dict[int, TextStream] = {}
        self._turn = RLock()
        self._is_stepping = False
        self._left: list[TextStream] = []
        """Streams that the garbage collector closed in the middle of a step."""

    @sparing_what_is_there()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; outputs come in the order of the prompts. A lower `priority` is served first.

        All inputs are checked first: RequestError names the index of a bad one, and nothing has started. Raises
        EngineError if a step fails or the LLM was closed.
        """
        check_priority(priority)
        batch = as_batch(prompts)
        each = params_of(params, len(batch))
        encoded = [self._checked(i, prompt, each[i]) for i, prompt in enumerate(batch)]
        groups: list[list[TextStream]] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            num_tokens, full_step = 0, self.engine.scheduler.limits.max_num_batched_tokens
            for ids, each_params in zip(encoded, each, strict=True):
                with self._undisturbed():
                    groups.append(self._start(ids, each_params, priority, is_streamed=False))
                before, num_tokens = num_tokens, num_tokens + len(ids)
                if before < full_step <= num_tokens:
                    self._step()  # the device need not wait for the rest
            streams = [stream for group in groups for stream in group]
            with Progress(*columns, disable=not progress) as bar:
                task = bar.add_task("generating", total=len(streams))
                waiting = deque(streams)
                while waiting:  # by its first alone: a look at each would cost more than the step if there are many
                    if waiting[0].is_done:
                        waiting.popleft()
                        continue
                    self._step()
                    if progress:
                        bar.update(task, completed=sum(stream.is_done for stream in streams))
        finally:
            self._end([stream for group in groups for stream in group])
        return [first.output(str(i), others) for i, (first, *others) in enumerate(groups)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[StreamChunk]:
        """Complete one prompt, yielding text as it becomes certain. Leaving the loop early ends the request.

        Streams may be read by turns: each turn advances all of them. Raises RequestError at once; EngineError.
        """
        check_priority(priority)
        params = params_of(params, 1)[0]
        if params.n != 1:
            raise RequestError(f"n must be 1 for a stream, which is one completion, not {params.n}; use generate")
        return self._chunks(self._checked(None, prompt, params), params, priority)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | None = None,
        *,
        priority: int = 0,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of one prompt or many, best first, beside whatever else runs.

        All inputs are checked first: RequestError names the index of a bad one, and nothing has started. Raises
        EngineError if a step fails or the LLM was closed.
        """
        check_priority(priority)
        params = BeamSearchParams() if params is None else params
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"params must be BeamSearchParams, not {shown(params)}")
        encoded = [self._checked(i, prompt, params) for i, prompt in enumerate(as_batch(prompts))]
        runs: list[BeamRun] = []
        try:
            for ids in encoded:
                with self._undisturbed():
                    runs.append(self.engine.add_beams(ids, params, priority))
            while any(run.finish_reason is None for run in runs):
                self._step()
        finally:
            with self._undisturbed():
                for run in runs:
                    self.engine.finish_beams(run, FinishReason.ABORT)
                self.engine.drain()
        each = zip(encoded, runs, strict=True)
        return [beam_output(str(i), self.tokenizer, ids, run) for i, (ids, run) in enumerate(each)]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text with the model's special tokens, messages through its chat template.

        Raises RequestError for anything else.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if hasattr(prompt, "tolist"):  # a numpy array or a tensor
            prompt = prompt.tolist()
        if isinstance(prompt, Mapping):
            raise RequestError("a chat is a list of messages: put the message into a list")
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise RequestError(f"a prompt is a text, a list of token ids or a list of messages, not {shown(prompt)}")
        if prompt and all(isinstance(part, Mapping) for part in prompt):
            return self.tokenizer.encode_chat([dict(part) for part in prompt if isinstance(part, Mapping)])
        return list(prompt)  # type: ignore[arg-type]

    def close(self) -> None:
        """End what runs and take no more. Weights and cache are freed with the object."""
        with self._undisturbed():
            self._end(list(self._streams.values()))
            self.engine.close()
            self._runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, index: int | None, prompt: Prompt, params: SamplingParams | BeamSearchParams) -> list[int]:
        try:
            ids = self.encode(prompt)
            if isinstance(params, BeamSearchParams):
                self.engine.check_beams(ids, params)
            else:
                self.engine.check(ids, params)
        except RequestError as error:
            raise error if index is None else RequestError(f"prompt {index}: {error}") from error
        return ids

    def _start(self, ids: list[int], params: SamplingParams, priority: int, *, is_streamed: bool) -> list[TextStream]:
        """A stream for each completion of a prompt."""
        first = self.engine.add(ids, params, priority, is_streamed=is_streamed, is_checked=True)
        streams = [TextStream(self.engine, self.tokenizer, each, ids) for each in (first, *first.siblings)]
        self._streams.update({stream.generation.request.number: stream for stream in streams})
        return streams

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Neither another thread nor Ctrl-C comes between what is done here."""
        with self._turn, interrupts_deferred():
            yield

    def _step(self) -> None:
        """Advance every request of this LLM by a step."""
        with self._undisturbed():
            self._is_stepping = True
            try:
                changed = self.engine.step()
            finally:
                self._is_stepping = False
            left, self._left = self._left, []
            if left:
                self._end(left)
            for generation in changed:
                stream = self._streams.get(generation.request.number)
                if stream is not None and stream.is_due:
                    stream.advance()

    def _end(self, streams: Sequence[TextStream]) -> None:
        """End those of `streams` that have not ended, and no other request; within a step, once it is over."""
        with self._undisturbed():
            if self._is_stepping:
                self._left += streams
                return
            for stream in streams:
                self._streams.pop(stream.generation.request.number, None)
                self.engine.finish(stream.generation, FinishReason.ABORT)
            self.engine.drain()

    def _chunks(self, ids: list[int], params: SamplingParams, priority: int) -> Iterator[StreamChunk]:
        streams: list[TextStream] = []
        try:
            with self._undisturbed():
                streams += self._start(ids, params, priority, is_streamed=True)
            (stream,) = streams
            is_done = False
            while not is_done:
                with self._undisturbed():
                    if not stream.is_done:
                        self._step()
                    is_done, (text, token_ids) = stream.is_done, stream.take()
                if token_ids or text or is_done:
                    yield StreamChunk(
                        text=text,
                        token_ids=token_ids,
                        finish_reason=stream.finish_reason,
                        output=stream.output("0") if is_done else None,
                    )
        finally:
            self._end(streams)


def params_of(params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
    """One SamplingParams per prompt, from one for all, one each, or none."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise RequestError(f"params must be SamplingParams or a list of them, not {shown(params)}")
    if len(params) != num:
        raise RequestError(f"{num} prompts and {len(params)} sampling parameters; give one for all, or one each")
    return list(params)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt as a list of one; many as a list.

    >>> as_batch([1, 2, 3])
    [[1, 2, 3]]
    """
    if not isinstance(prompts, (list, tuple)):
        return [prompts]  # type: ignore[list-item]
    is_one = bool(prompts) and (as_int(prompts[0]) is not None or isinstance(prompts[0], Mapping))
    return [prompts] if is_one else list(prompts)
