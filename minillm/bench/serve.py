"""`minillm bench serve`: load on any OpenAI-compatible server, over HTTP, from this process. It knows no engine.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minillm.bench.latency import METRICS, Outcome, figures_of, goals_of, values_of
from minillm.bench.lengths import TRACES, length_of
from minillm.bench.serve_options import FIRST_TOKEN_ID, ServeOptions
from minillm.errors import ConfigError

__all__ = ["read_key", "run"]

WORDS = ("time", "river", "stone", "light", "house", "green", "paper", "night", "water", "music", "field", "glass")


@dataclass(slots=True)
class Planned:
    """A request to come, `at` seconds after the start."""

    at: float
    prompt: list[int]
    num_output: int


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


class Client:
    """A server and what it is asked."""

    def __init__(self, http: httpx.AsyncClient, model: str, options: ServeOptions) -> None:
        self._http, self._model, self._options = http, model, options

    async def send(self, planned: Planned) -> Outcome:
        """One request, to its end or its failure."""
        outcome = Outcome(len(planned.prompt), time.perf_counter())
        path = "/v1/completions" if self._options.endpoint == "completions" else "/v1/chat/completions"
        try:
            async with self._http.stream("POST", path, json=self._body(planned)) as response:
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread()).decode(errors="replace")
                    outcome.error = f"{response.status_code}: {text[:200]}"
                    return outcome
                async for line in response.aiter_lines():
                    read_line(line, outcome)
        except (httpx.HTTPError, ValueError) as error:
            outcome.error = outcome.error or f"{type(error).__name__}: {error}"
        if not outcome.chunk_times:
            outcome.error = outcome.error or "no token came"
        outcome.num_output = outcome.num_output or len(outcome.chunk_times)
        return outcome

    def _body(self, planned: Planned) -> dict[str, Any]:
        options = self._options
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": planned.num_output,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        if options.endpoint == "completions":
            return body | {"prompt": planned.prompt}
        text = " ".join(WORDS[token % len(WORDS)] for token in planned.prompt)
        return body | {"messages": [{"role": "user", "content": text}]}


def read_line(line: str, outcome: Outcome) -> None:
    """Note what a line of a stream of events brings."""
    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
        return
    chunk = json.loads(line[5:])
    if "error" in chunk:
        outcome.error = str(chunk["error"])[:200]
    choices = chunk.get("choices") or [{}]
    if choices[0].get("text") or (choices[0].get("delta") or {}).get("content"):
        outcome.chunk_times.append(time.perf_counter())
    if chunk.get("usage"):
        outcome.num_output = chunk["usage"].get("completion_tokens", 0)


async def find_model(http: httpx.AsyncClient, model: str | None) -> tuple[str, int | None]:
    """Name and longest request of a model of the server. Raises ConfigError."""
    try:
        response = await http.get("/v1/models")
        response.raise_for_status()
        cards = response.json()["data"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"base_url {http.base_url} does not list its models: {error}") from error
    card = next((card for card in cards if model in (None, card["id"])), None)
    if card is None:
        raise ConfigError(f"the server has no model {model!r}; it has {', '.join(card['id'] for card in cards)}")
    return card["id"], card.get("max_model_len")


async def load(options: ServeOptions, key: str | None, transport: httpx.AsyncBaseTransport | None) -> list[Outcome]:
    """Send the whole load and wait for all of it."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=options.base_url, headers=headers, timeout=options.timeout, limits=limits, transport=transport
    ) as http:
        model, max_len = await find_model(http, options.model)
        client = Client(http, model, options)
        requests = plan_load(options, max_len)
        for warm_up in requests[: options.num_warmups]:
            outcome = await client.send(warm_up)
            if outcome.error:
                raise ConfigError(f"the server refused the first request: {outcome.error}")
        room = asyncio.Semaphore(options.max_concurrency or len(requests))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("requests", total=len(requests))
            start = time.perf_counter()

            async def send_when_due(planned: Planned) -> Outcome:
                await asyncio.sleep(planned.at - (time.perf_counter() - start))
                async with room:
                    outcome = await client.send(planned)
                bar.advance(task)
                return outcome

            return await asyncio.gather(*map(send_when_due, requests))


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


def read_key(path: Path) -> str:
    """The first key of a file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").split()[0]
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"api_key_file {path} holds no key that can be read: {error}") from error


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
