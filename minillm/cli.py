"""The `minillm` command: argv in, text out. It alone reads argv and the environment, and computes nothing itself.

Options come from the fields of EngineConfig and SamplingParams, their help from the docstring under each field.
Torch is imported by the command that needs it, so help and errors in the command line come at once.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer

from minillm import __version__
from minillm.cli_bench import bench
from minillm.config import EngineConfig
from minillm.errors import ConfigError, MiniLLMError, RequestError
from minillm.model_option import DEFAULT_MODEL, ModelOption, fetch, prepare
from minillm.options import with_fields
from minillm.server.config import ServerConfig
from minillm.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from minillm.llm import LLM, Message, Prompt, StreamChunk

NOT_SHOWN = ("logprobs", "prompt_logprobs", "n")
"""Parameters whose results a stream of text has no place for."""

app = typer.Typer(
    help="A small, readable, fast LLM inference engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line. A user's mistake is one line and exit status 2; Ctrl-C is status 130."""
    try:
        app()
    except MiniLLMError as error:
        print(f"minillm: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def open_model(name: str, engine: EngineConfig) -> Iterator[LLM]:
    """A model ready to generate; one that ships with MiniLLM's packages is fetched first, under a progress bar."""
    from minillm.llm import LLM

    prepare(name)
    with LLM(name, **asdict(engine)) as llm:
        yield llm


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


def show(chunks: Iterable[StreamChunk], stop: Event | None = None) -> RequestOutput | None:
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


def version(is_wanted: bool) -> None:
    """Print the version and end."""
    if is_wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `minillm` itself."""


@app.command()
@with_fields(EngineConfig, "engine")
@with_fields(SamplingParams, "sampling", NOT_SHOWN, temperature=0.0)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask or to continue; - reads it from standard input.")],
    model: ModelOption = DEFAULT_MODEL,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    *,
    engine: EngineConfig,
    sampling: SamplingParams,
) -> None:
    """Answer one prompt, streaming; a line with the timings follows on standard error."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_model(model, engine) as llm:
        is_chat = not raw and llm.tokenizer.has_chat_template
        asked: Prompt = [{"role": "user", "content": text}] if is_chat else text
        show(llm.stream(asked, sampling))


@app.command()
@with_fields(EngineConfig, "engine")
@with_fields(SamplingParams, "sampling", NOT_SHOWN, temperature=0.0, max_tokens=512)
def chat(
    model: ModelOption = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="A system message to start with.")] = None,
    *,
    engine: EngineConfig,
    sampling: SamplingParams,
) -> None:
    """Talk to a model over several turns.

    /clear forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer.
    """
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    with open_model(model, engine) as llm:
        messages = list(start)
        print(f"{model} is ready. /clear forgets what was said, /quit ends.", file=sys.stderr)
        for line in lines_typed():
            if line == "/clear":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": line})
            try:
                with interrupts_noted() as stop:
                    output = show(llm.stream(messages, sampling), stop)
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


@app.command()
@with_fields(EngineConfig, "engine")
@with_fields(ServerConfig, "server")
def serve(
    model: ModelOption = DEFAULT_MODEL,
    *,
    engine: EngineConfig,
    server: ServerConfig,
) -> None:
    """Serve a model to OpenAI's clients over HTTP.

    SIGTERM or Ctrl-C lets requests finish, a second one aborts them. A key may also come in MINILLM_API_KEY.
    """
    try:
        from minillm.server import run
        from minillm.server.auth import read_keys
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error.name}): pip install 'minillm[server]'") from error

    keys = read_keys(server.api_key_file, os.environ.get("MINILLM_API_KEY"))
    server.check_exposed(bool(keys))
    prepare(model)
    run.serve(model, engine, server, keys)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="Name of a model to fetch.")] = DEFAULT_MODEL,
) -> None:
    """Fetch a model unless it is there unharmed and print where it lies; other commands do this by themselves."""
    print(fetch(model, verify=True))


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A flight recording, as a server's /recording gives it.")],
) -> None:
    """Run a recorded schedule again and say where it differs, with exit status 1 if it does."""
    from minillm.engine import replay as player

    found = player.replay(player.load(file))
    print(found.difference or f"{found.num_steps} steps were planned as they were recorded")
    if found.difference is not None:
        raise typer.Exit(1)
