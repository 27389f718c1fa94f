"""`minillm bench …`: the benchmarks' command line. Each is imported when it runs, so that help comes at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from minillm.bench.gap_options import GapOptions
from minillm.bench.serve_options import ServeOptions
from minillm.config import EngineConfig
from minillm.errors import ConfigError
from minillm.model_option import ModelOption, prepare
from minillm.options import with_fields

__all__ = ["bench"]

bench = typer.Typer(help="Measure speed; each benchmark ends with one JSON line.", no_args_is_help=True)


def spawn_peers() -> None:
    """Have vLLM start its processes afresh: a fork cannot use CUDA once this process has looked for a GPU."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


@bench.command("offline")
@with_fields(EngineConfig, "config", enable_prefix_caching=False)
def bench_offline(
    engine: Annotated[
        list[str] | None, typer.Option(help="minillm (the default), transformers or vllm; give it again to compare.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="nano (the default), bs1, bs64, prefill; for a CPU cpu-bs1, cpu-bs16, cpu-prefill. Repeat for more."
        ),
    ] = None,
    model: ModelOption = "random:qwen3-0.6b",
    num_prompts: Annotated[int | None, typer.Option(help="Requests, in place of the workload's number.")] = None,
    input_len: Annotated[int | None, typer.Option(help="Tokens of each prompt.")] = None,
    output_len: Annotated[int | None, typer.Option(help="Tokens that each request asks for.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Runs: of up to 2 the best counts, of more the median.")
    ] = None,
    *,
    config: EngineConfig,
) -> None:
    """Throughput of a fixed set of requests, on one engine or several in one run.

    --dtype is minillm's; transformers and vLLM run bfloat16 on a GPU, transformers float32 on a CPU.
    """
    from minillm.bench import offline

    spawn_peers()
    prepare(model)
    offline.run(
        engines=engine or ["minillm"],
        workloads=workload or ["nano"],
        model=model,
        config=config,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        repeats=repeats,
    )


@bench.command("load")
@with_fields(EngineConfig, "config", enable_prefix_caching=False)
def bench_load(
    engine: Annotated[
        list[str] | None, typer.Option(help="minillm (the default) or vllm; give it again to compare.")
    ] = None,
    model: ModelOption = "random:llama-3.1-8b",
    qps: Annotated[list[float] | None, typer.Option(help="Requests a second; repeat for more (3 and 6).")] = None,
    seconds: Annotated[float, typer.Option(help="How long requests arrive, at each rate.")] = 60.0,
    vllm_budget: Annotated[list[int] | None, typer.Option(help="Tokens of vLLM's steps; repeat (2048).")] = None,
    *,
    config: EngineConfig,
) -> None:
    """Latencies under requests that arrive at random; the options below are minillm's, the seed also the arrivals'."""
    from minillm.bench import load

    spawn_peers()
    prepare(model)
    load.run(
        engines=engine or ["minillm"],
        model=model,
        rates=qps or [3.0, 6.0],
        seconds=seconds,
        vllm_budgets=vllm_budget or [2048],
        config=config,
    )


KeyFileOption = Annotated[Path | None, typer.Option(help="File with the server's key, or MINILLM_API_KEY.")]


def read_key(path: Path | None) -> str | None:
    """The first key of a file, or the environment's. Raises ConfigError."""
    if path is None:
        return os.environ.get("MINILLM_API_KEY")
    try:
        return path.read_text(encoding="utf-8").split()[0]
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"api_key_file {path} holds no key that can be read: {error}") from error


def lacks_packages(command: str, error: ImportError) -> ConfigError:
    """What to install for a benchmark over HTTP."""
    return ConfigError(f"bench {command} needs more packages ({error.name}): pip install 'minillm[bench]'")


@bench.command("serve")
@with_fields(ServeOptions, "options")
def bench_serve(api_key_file: KeyFileOption = None, *, options: ServeOptions) -> None:
    """Latencies and throughput of any OpenAI-compatible server under an open loop of requests."""
    try:
        from minillm.bench import serve
    except ImportError as error:
        raise lacks_packages("serve", error) from error
    serve.run(options, read_key(api_key_file))


@bench.command("gap")
@with_fields(GapOptions, "options")
def bench_gap(api_key_file: KeyFileOption = None, *, options: GapOptions) -> None:
    """The worst gap between others' tokens while a long prompt is read, on any OpenAI-compatible server."""
    try:
        from minillm.bench import gap
    except ImportError as error:
        raise lacks_packages("gap", error) from error
    gap.run(options, read_key(api_key_file))


@bench.command("kernels")
def bench_kernels() -> None:
    """Each kernel's time beside what the machine can do."""
    from minillm.bench import kernels

    kernels.run()


@bench.command("profile")
@with_fields(EngineConfig, "config", enable_prefix_caching=False)
def bench_profile(
    workload: Annotated[str, typer.Option(help="nano, bs1, bs64, prefill.")] = "nano",
    model: ModelOption = "random:qwen3-0.6b",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a request: a profile of all is large.")] = 90,
    picture: Annotated[Path | None, typer.Option(help="Draw a step into this .svg or .png (needs matplotlib).")] = None,
    *,
    config: EngineConfig,
) -> None:
    """Where the time of a GPU's steps goes: kernels by kind, and gaps."""
    from minillm.bench import gpu_profile

    prepare(model)
    gpu_profile.run(model=model, workload=workload, max_tokens=max_tokens, config=config, picture=picture)


@bench.command("staircase")
def bench_staircase(
    model: ModelOption = "random:qwen3-0.6b",
    max_tokens: Annotated[int, typer.Option(help="Largest step that is measured.")] = 2048,
) -> None:
    """Time of a layer's matrix products by the tokens of a step."""
    from minillm.bench import staircase

    staircase.run(model=model, max_tokens=max_tokens)


@bench.command("scheduler")
def bench_scheduler() -> None:
    """Host time of one step's plan and update."""
    from minillm.bench import scheduler

    scheduler.run()


PictureOption = Annotated[Path | None, typer.Option(help="Draw the figures into this .svg or .png (needs matplotlib).")]


@bench.command("memory")
def bench_memory(
    max_length: Annotated[int, typer.Option(help="Longest prompt of the tables.")] = 32_768,
    picture: PictureOption = None,
) -> None:
    """Measured peaks of attention and of a prefill in chunks, and the longest prompt."""
    from minillm.bench import memory

    memory.run(max_length=max_length, picture=picture)


@bench.command("decode")
def bench_decode(
    max_context: Annotated[int, typer.Option(help="Longest context of the table.")] = 2048,
    picture: PictureOption = None,
) -> None:
    """Time per token with a KV cache and without, and tokens per second of 16 sequences."""
    from minillm.bench import decode

    decode.run(max_context=max_context, picture=picture)


@bench.command("speculation")
@with_fields(EngineConfig, "config", enable_prefix_caching=False)
def bench_speculation(
    model: ModelOption = "smollm2",
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests at once; give it again for more. 1, 64 and 256 by default."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs, of which the median counts.")] = 3,
    *,
    config: EngineConfig,
) -> None:
    """Speed with drafts over speed without, on ten prompts that ask to summarise and to edit."""
    from minillm.bench import speculation

    prepare(model)
    sizes = batch_size or speculation.BATCH_SIZES
    speculation.run(model=model, config=config, batch_sizes=sizes, max_tokens=max_tokens, repeats=repeats)


@bench.command("lossless")
@with_fields(EngineConfig, "config")
def bench_lossless(
    model: ModelOption = "smollm2",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a request that is compared.")] = 64,
    num_draws: Annotated[int, typer.Option(min=1, help="Draws of the chi-square test.")] = 20_000,
    *,
    config: EngineConfig,
) -> None:
    """Drafts change no token, and samples beside them have the model's distribution."""
    from minillm.bench import lossless

    prepare(model)
    lossless.run(model=model, config=config, max_tokens=max_tokens, num_draws=num_draws)


@bench.command("company")
@with_fields(EngineConfig, "config", enable_prefix_caching=False)
def bench_company(
    model: ModelOption = "smollm2",
    num_rows: Annotated[int, typer.Option(min=2, help="Rows that decode at once, the demanding one included.")] = 256,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens that each row generates.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind of row.")] = 3,
    *,
    config: EngineConfig,
) -> None:
    """What one row with penalties, biases, logprobs or a grammar costs the plain rows beside it."""
    from minillm.bench import company

    prepare(model)
    company.run(
        model=model, config=config, num_rows=num_rows, input_len=input_len, output_len=output_len, repeats=repeats
    )
