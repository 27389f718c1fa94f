"""`minillm bench gap`: what a long prompt does to the streams of others, on any OpenAI-compatible server.

    streams  | | | | | | | | | | | | | |   |   |   |   |   | | | |      each bar a chunk, for every stream
             <------- before ------->  ^ <----- during --->             gaps that touch the time
        all have begun           long prompt                first token of its answer

It knows no engine. A stream's chunk stands for a token.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from minillm.bench.gap_options import GapOptions
from minillm.bench.gap_streams import own_streams, shared_streams
from minillm.bench.latency import Outcome, percentile
from minillm.bench.serve_options import FIRST_TOKEN_ID
from minillm.bench.stream_client import Planned, Server, connected, find_model
from minillm.engine.collector import sparing_what_is_there
from minillm.errors import ConfigError

__all__ = ["figures_of", "run"]


def run(
    options: GapOptions, key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
) -> dict[str, Any]:
    """Measure the gaps; print a table and a JSON line, and return it. Raises ConfigError.

    `transport`: how to reach a server that listens on no socket.
    """
    with sparing_what_is_there():  # what the collector walks here would be taken for the server's gaps
        began, long, streams = asyncio.run(measure(options, key, transport))
    line = {"bench": "gap", **figures_of(began, long, streams), "options": asdict(options)}
    show(line)
    print(json.dumps(line, allow_nan=False))
    return line


async def measure(
    options: GapOptions, key: str | None, transport: httpx.AsyncBaseTransport | None
) -> tuple[float, Outcome, list[list[float]]]:
    """When all streams had begun, the long request's outcome, and the times of each stream's chunks.

    Raises ConfigError if any of them failed.
    """
    rng = random.Random(options.seed)

    def draw(num_input: int, num_output: int) -> Planned:
        prompt = [rng.randrange(FIRST_TOKEN_ID, options.vocab_size) for _ in range(num_input)]
        return Planned(0.0, prompt, num_output)

    server = Server(base_url=options.base_url, key=key, timeout=options.timeout)
    async with connected(server, transport) as asking:
        model, max_len = await find_model(asking.http, options.model)
    if max_len is not None and options.long_len + 1 > max_len:
        raise ConfigError(f"long_len {options.long_len} is too long for the server, whose requests hold {max_len}")
    num_output = options.output_len if max_len is None else min(options.output_len, max_len - options.input_len)
    server = replace(server, model=model)
    load = [draw(options.input_len, num_output) for _ in range(options.num_streams)]
    planned = draw(options.long_len, 1)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(server, transport))
        is_shared = transport is None and options.num_clients > 1
        streams = await stack.enter_async_context(
            shared_streams(server, load, options.num_clients) if is_shared else own_streams(client, load)
        )
        await streams.next_chunk()
        began = time.perf_counter()
        await asyncio.sleep(options.seconds)
        await streams.next_chunk()
        await streams.next_chunk()  # two, so that a gap lies before however slow the server is
        long = await client.send(planned)
        if long.error:
            raise ConfigError(f"the long request failed: {long.error}")
        await streams.next_chunk()  # the gaps that its answer ended in
        return began, long, await streams.times()


def figures_of(began: float, long: Outcome, streams: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Gaps in milliseconds, of all streams: those since all had begun, and those that the long prompt touched."""
    arrived, answered = long.sent, long.chunk_times[0]
    gaps = [pair for times in streams for pair in pairwise(times)]
    before = sorted(1e3 * (b - a) for a, b in gaps if began <= a and b <= arrived)
    during = sorted(1e3 * (b - a) for a, b in gaps if b > arrived and a < answered)
    median = statistics.median(before)
    return {
        "num_streams": len(streams),
        "long_tokens": long.num_input,
        "long_ttft_ms": 1e3 * (answered - arrived),
        "median_gap_before_ms": median,
        "p99_gap_before_ms": percentile(before, 99),
        "max_gap_before_ms": before[-1],
        "median_gap_during_ms": statistics.median(during),
        "p99_gap_during_ms": percentile(during, 99),
        "max_gap_during_ms": during[-1],
        "max_over_median": during[-1] / median,
    }


def show(line: dict[str, Any]) -> None:
    """Print the table."""
    title = f"bench gap: {line['num_streams']} streams, a prompt of {line['long_tokens']:,} tokens"
    table = Table("gaps between tokens, ms", "median", "p99", "worst", title=title)
    for name, when in (("before", "before it arrived"), ("during", "until its first token")):
        table.add_row(when, *(f"{line[f'{which}_gap_{name}_ms']:,.2f}" for which in ("median", "p99", "max")))
    table.caption = (
        f"the worst is {line['max_over_median']:.2f} times the median before; "
        f"the long prompt's first token took {line['long_ttft_ms']:,.0f} ms"
    )
    Console().print(table)
