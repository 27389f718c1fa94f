"""The `minillm` command: argv in, text out. It alone reads argv and the environment, and computes nothing itself.

Options come from the fields of EngineConfig and SamplingParams, their help from the docstring under each field.
Torch is imported by the command that needs it, so help and errors in the command line come at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillm import __version__
from minillm.cli_bench import bench
from minillm.client import ServerClient
from minillm.config import EngineConfig
from minillm.errors import ConfigError, MiniLLMError
from minillm.model_option import DEFAULT_MODEL, ModelOption, fetch, prepare
from minillm.options import with_fields
from minillm.server.config import ServerConfig
from minillm.terminal import show, talk
from minillm.types import SamplingParams

if TYPE_CHECKING:
    from minillm.llm import LLM, Prompt

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
    # Bytes that are no text are refused as a prompt; letters that the terminal has not got become question marks.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
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
    url: Annotated[str | None, typer.Option(help="Talk to the server there, as http://127.0.0.1:8000.")] = None,
    *,
    engine: EngineConfig,
    sampling: SamplingParams,
) -> None:
    """Talk to a model over several turns, in this process or on a server, whose key MINILLM_API_KEY holds.

    /clear forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer.
    """
    if url is not None:
        if engine != EngineConfig():
            raise ConfigError("with url the server's own options count: leave those of the engine out")
        client = ServerClient(url, os.environ.get("MINILLM_API_KEY"))
        talk(client.model, system, lambda messages: client.stream(messages, sampling))
        return
    with open_model(model, engine) as llm:
        talk(model, system, lambda messages: llm.stream(messages, sampling))


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
