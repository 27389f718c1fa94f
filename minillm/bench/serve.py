"""`minillm bench serve`: load on any OpenAI-compatible server, over HTTP. It knows no engine.

The loop is open: requests are sent when they are due, whether or not those before them are answered, unless
`max_concurrency` holds them back (then they count from when they are sent). A chunk of a stream stands for a token,
as in `vllm bench serve`; their number comes from the server's usage.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minillm.bench.client_processes import send_from_processes
from minillm.bench.latency import METRICS, Outcome, figures_of, goals_of, values_of
from minillm.bench.lengths import TRACES, length_of
from minillm.bench.serve_options import FIRST_TOKEN_ID, ServeOptions
from minillm.bench.stream_client import Planned, Server, connected, find_model, send_when_due
from minillm.errors import ConfigError

__all__ = ["run"]


def plan_load(options: ServeOptions, max_len: int | None) -> list[Planned]:
    """All requests, the same at every run of one seed; prompts and then outputs are cut to what the server takes."""
    rng = random.Random(options.seed)
    lengths = length_of(options.input_len, "input_len"), length_of(options.output_len, "output_len")
    draw_input, draw_output = TRACES[options.trace] if options.trace else lengths
    planned, at = [], 0.0
    for _ in range(options.num_prompts):
        num_input, num_output = draw_input(rng), draw_output(rng)
        if max_len is not None:
            num_output = min(num_output, max_len - 1)
            num_input = min(num_input, max_len - num_output)
        prompt = [rng.randrange(FIRST_TOKEN_ID, options.vocab_size) for _ in range(num_input)]
        planned.append(Planned(at, prompt, num_output))
        if math.isfinite(options.request_rate):
            at += rng.gammavariate(options.burstiness, 1 / (options.request_rate * options.burstiness))
    return planned


async def load(options: ServeOptions, key: str | None, transport: httpx.AsyncBaseTransport | None) -> list[Outcome]:
    """Send the whole load and wait for all of it."""
    server = Server(
        base_url=options.base_url,
        key=key,
        endpoint=options.endpoint,
        ignore_eos=options.ignore_eos,
        timeout=options.timeout,
    )
    async with connected(server, transport) as asking:
        model, max_len = await find_model(asking.http, options.model)
    server = replace(server, model=model)
    requests = plan_load(options, max_len)
    room = options.max_concurrency or len(requests)
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=len(requests))

        def take(outcome: Outcome) -> None:
            outcomes.append(outcome)
            bar.advance(task)

        async with connected(server, transport) as client:
            for warm_up in requests[: options.num_warmups]:
                outcome = await client.send(warm_up)
                if outcome.error:
                    raise ConfigError(f"the server refused the first request: {outcome.error}")
            if options.num_clients == 1:
                await send_when_due(client, requests, time.perf_counter(), room, take)
        if options.num_clients > 1:
            await send_from_processes(server, requests, options.num_clients, room, take)
    return outcomes


def run(
    options: ServeOptions, key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
) -> dict[str, Any]:
    """Load the server; print a table and a JSON line, and return it. Raises ConfigError.

    `transport`: how to reach a server that listens on no socket.
    """
    shares, goals = options.shares(), goals_of([part for part in options.goodput.split(",") if part])
    outcomes = asyncio.run(load(options, key, transport))
    figures = figures_of(outcomes, shares, goals)
    show(figures, shares)
    errors = sorted({outcome.error for outcome in outcomes if outcome.error})
    for error in errors[:5]:
        Console(stderr=True).print(f"failed: {error}", markup=False)
    if options.plot is not None:
        draw(options.plot, [outcome for outcome in outcomes if not outcome.error])
    sent = {name: value if value != math.inf else "inf" for name, value in asdict(options).items()}
    line = {"bench": "serve", **figures, "options": sent | {"plot": str(options.plot or "")}}
    print(json.dumps(line, allow_nan=False))
    return line


def show(figures: dict[str, Any], shares: Sequence[float]) -> None:
    """Print the table."""
    table = Table("", "value", title="bench serve")
    for name, value in figures.items():
        if not name.endswith("_ms") and value is not None:
            table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    names = ["mean", "median", "std", *(f"p{share:g}" for share in shares)]
    times = Table("milliseconds", *names)
    for metric in METRICS:
        if f"mean_{metric}_ms" in figures:
            times.add_row(metric.upper(), *(f"{figures[f'{name}_{metric}_ms']:,.2f}" for name in names))
    Console().print(times)


def draw(path: Path, done: Sequence[Outcome]) -> None:
    """Draw the share of values below each time, a picture for each metric. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plot needs matplotlib: pip install 'minillm[bench]'") from error
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 2).flat, METRICS, strict=True):
        values = sorted(1e3 * value for value in values_of(done, metric))
        axes.plot(values, [(i + 1) / len(values) for i in range(len(values))])
        axes.set(xlabel=f"{metric.upper()}, ms", ylabel="share of values", ylim=(0, 1))
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot {path} cannot be written: {error}") from error
