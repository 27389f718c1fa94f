"""LLM: the offline API. Text, token ids or chat messages in; texts, tokens and timings out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minillm.config import EngineConfig
from minillm.engine.launch import launch
from minillm.engine.output import TextStream
from minillm.errors import RequestError
from minillm.types import FinishReason, RequestOutput, SamplingParams

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
    """A model, ready to generate.

    llm = LLM("smollm2")
    for out in llm.generate(["The capital of France is"], SamplingParams(max_tokens=32)):
        print(out.text, out.timings)
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        """`model`: smollm2, a folder, a .gguf file, a hub id or random:NAME. `options`: fields of EngineConfig.

        Raises TypeError for an unknown option; ConfigError, ModelNotFoundError, CheckpointError, DownloadError.
        """
        self.config = EngineConfig(**options)
        launched = launch(model, self.config)
        self.engine, self._runner = launched.engine, launched.runner
        self.tokenizer, self.model_config = launched.tokenizer, launched.model_config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; outputs come in the order of the prompts.

        All inputs are checked first: RequestError names the index of a bad one, and nothing has started.
        """
        batch = as_batch(prompts)
        each = self._params_of(params, len(batch))
        encoded = [self._checked(i, prompt, each[i]) for i, prompt in enumerate(batch)]
        streams = [self._start(ids, p) for ids, p in zip(encoded, each, strict=True)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("generating", total=len(streams))
            for _ in self._run(streams):
                bar.advance(task)
        return [stream.output(str(i)) for i, stream in enumerate(streams)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Complete one prompt, yielding text as it becomes certain. Leaving the loop early ends the request."""
        params = params or SamplingParams()
        stream = self._start(self._checked(None, prompt, params), params)
        num_yielded = 0
        try:
            while not stream.is_done:
                for generation in self.engine.step():
                    if generation is not stream.generation:
                        continue
                    text = stream.advance()
                    output = stream.output("0") if stream.is_done else None
                    token_ids = stream.token_ids[num_yielded:]
                    num_yielded += len(token_ids)
                    yield StreamChunk(
                        text=text, token_ids=token_ids, finish_reason=generation.finish_reason, output=output
                    )
        finally:
            self.engine.abort_all()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text with the model's special tokens, messages through its chat template."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and all(isinstance(part, Mapping) for part in prompt):
            return self.tokenizer.encode_chat([dict(part) for part in prompt if isinstance(part, Mapping)])
        return list(prompt)  # type: ignore[arg-type]

    def close(self) -> None:
        """End what runs and let go of the device's worker."""
        self.engine.abort_all()
        self._runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params_of(self, params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
        if params is None:
            params = SamplingParams()
        if isinstance(params, SamplingParams):
            return [params] * num
        if len(params) != num:
            raise RequestError(f"{num} prompts and {len(params)} sampling parameters; give one for all, or one each")
        return list(params)

    def _checked(self, index: int | None, prompt: Prompt, params: SamplingParams) -> list[int]:
        try:
            ids = self.encode(prompt)
            self.engine.check(ids, params)
        except RequestError as error:
            raise error if index is None else RequestError(f"prompt {index}: {error}") from error
        return ids

    def _start(self, ids: list[int], params: SamplingParams) -> TextStream:
        return TextStream(self.engine, self.tokenizer, self.engine.add(ids, params), ids)

    def _run(self, streams: Sequence[TextStream]) -> Iterator[TextStream]:
        """Step until all streams ended, yielding each as it does; what is left when the caller goes is aborted."""
        by_generation = {id(stream.generation): stream for stream in streams}
        num_left = len(streams)
        try:
            while num_left:
                for generation in self.engine.step():
                    stream = by_generation.get(id(generation))
                    if stream is None:
                        continue
                    stream.advance()
                    if stream.is_done:
                        num_left -= 1
                        yield stream
        finally:
            self.engine.abort_all()


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt as a list of one; many as a list.

    >>> as_batch([1, 2, 3])
    [[1, 2, 3]]
    """
    if isinstance(prompts, str) or not prompts or isinstance(prompts[0], (int, Mapping)):
        return [prompts] if prompts != [] else []  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
