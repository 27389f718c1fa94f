"""What the terminal shows of an answer and takes of a talk. It knows no engine: an answer is a stream of chunks."""

from __future__ import annotations

import importlib
import math
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event
from typing import Any, Protocol

from minillm.errors import RequestError
from minillm.types import RequestOutput

__all__ = ["milliseconds", "show", "talk"]


class Chunk(Protocol):
    """A piece of an answer; the whole comes with the last one."""

    @property
    def text(self) -> str:
        """New text."""

    @property
    def output(self) -> RequestOutput | None:
        """The finished answer, or None."""


def closing_line(output: RequestOutput) -> str:
    """What a request cost: prompt and cached tokens, TTFT, median and p99 ITL, tokens per second."""
    timings = output.timings
    parts = [f"{timings.num_prompt_tokens} prompt tokens, {timings.num_cached_tokens} cached"]
    if timings.ttft is not None:
        parts.append(f"TTFT {milliseconds(timings.ttft)}")
    if timings.itl:
        gaps = sorted(timings.itl)
        p99 = gaps[math.ceil(0.99 * len(gaps)) - 1]
        parts.append(f"ITL median {milliseconds(statistics.median(gaps))}, p99 {milliseconds(p99)}")
    parts.append(f"{len(output.token_ids)} tokens")
    if timings.tokens_per_second is not None:
        parts.append(f"{timings.tokens_per_second:.1f} tokens/s")
    return " · ".join(parts)


def milliseconds(seconds: float) -> str:
    """Three significant figures, or all before the point.

    >>> milliseconds(0.01234)
    '12.3 ms'
    """
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 99.95 else f"{value:.3g} ms"


def show(chunks: Iterable[Chunk], stop: Event | None = None) -> RequestOutput | None:
    """Print a stream as it comes, then its closing line on standard error; None if `stop` was set before its end."""
    output = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        output = chunk.output
        if stop is not None and stop.is_set():
            break
    print(flush=True)
    if output is not None:
        print(closing_line(output), file=sys.stderr)
    return output


@contextmanager
def interrupts_noted() -> Iterator[Event]:
    """Ctrl-C sets the event instead of breaking into a step, so that the model can go on afterwards."""
    noted = Event()
    before = signal.signal(signal.SIGINT, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def talk(model: str, system: str | None, answer: Callable[[Sequence[dict[str, Any]]], Iterable[Chunk]]) -> None:
    """Read lines and print answers until /quit or the end of the input. `answer` continues a conversation."""
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    print(f"{model} is ready. /clear forgets what was said, /quit ends.", file=sys.stderr)
    for line in lines_typed():
        if line == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            with interrupts_noted() as stop:
                output = show(answer(messages), stop)
        except RequestError as error:
            output = None
            print(f"minillm: {error} (/clear forgets what was said)", file=sys.stderr)
        if output is None:
            messages.pop()  # an unanswered question is no part of the talk
        else:
            messages.append({"role": "assistant", "content": output.text})


def lines_typed() -> Iterator[str]:
    """What the user types, line by line without the empty ones, until /quit or the end of the input."""
    with suppress(ImportError):
        importlib.import_module("readline")  # gives `input` line editing and history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line
