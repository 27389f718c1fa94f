"""A server as a benchmark's client sees it: requests sent, chunks of answers and when they came. It draws no load.

`python -m minillm.bench.stream_client` is such a client in a process of its own: a job as one line of JSON on standard
input, an outcome a line on standard output. The clock of `perf_counter` is one for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import httpx

from minillm.bench.latency import Outcome
from minillm.client import events_in, parts_of
from minillm.errors import ConfigError, RequestError

__all__ = ["Planned", "Server", "StreamClient", "connected", "find_model", "send_when_due"]

WORDS = ("time", "river", "stone", "light", "house", "green", "paper", "night", "water", "music", "field", "glass")


class Planned(NamedTuple):
    """A request to come, `at` seconds after the start."""

    at: float
    prompt: list[int]
    num_output: int


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where requests go and in what form."""

    base_url: str
    model: str = ""
    key: str | None = None
    endpoint: str = "completions"
    """completions sends token ids, chat sends words (about a token each)."""
    ignore_eos: bool = True
    timeout: float = 600.0


@asynccontextmanager
async def connected(server: Server, transport: httpx.AsyncBaseTransport | None = None) -> AsyncIterator[StreamClient]:
    """A client with as many connections as it has requests."""
    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    # None is kept: whenever a request ends the pool goes through all that are idle for each of them.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=server.base_url, headers=headers, timeout=server.timeout, limits=limits, transport=transport
    ) as http:
        yield StreamClient(http, server)


class StreamClient:
    """Sends requests to a server and takes the times of what comes back."""

    def __init__(self, http: httpx.AsyncClient, server: Server) -> None:
        self.http, self._server = http, server

    async def send(self, planned: Planned, note_chunk: Callable[[float], None] = lambda time: None) -> Outcome:
        """One request, to its end or its failure; `note_chunk` is told when something came."""
        outcome = Outcome(len(planned.prompt), time.perf_counter())
        path = "/v1/completions" if self._server.endpoint == "completions" else "/v1/chat/completions"
        lines: list[tuple[float, bytes]] = []
        try:
            async with self.http.stream("POST", path, json=self._body(planned)) as response:
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread()).decode(errors="replace")
                    outcome.error = f"{response.status_code}: {text[:200]}"
                    return outcome
                rest = b""
                async for data in response.aiter_bytes():
                    now = time.perf_counter()
                    *whole, rest = (rest + data).split(b"\n")
                    lines += [(now, line) for line in whole if line.startswith(b"data:")]
                    note_chunk(now)
        except httpx.HTTPError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        read_lines(lines, outcome)
        if not outcome.chunk_times:
            outcome.error = outcome.error or "no token came"
        outcome.num_output = outcome.num_output or len(outcome.chunk_times)
        return outcome

    def _body(self, planned: Planned) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._server.model,
            "max_tokens": planned.num_output,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._server.ignore_eos:
            body["ignore_eos"] = True
        if self._server.endpoint == "completions":
            return body | {"prompt": planned.prompt}
        text = " ".join(WORDS[token % len(WORDS)] for token in planned.prompt)
        return body | {"messages": [{"role": "user", "content": text}]}


def read_lines(lines: Sequence[tuple[float, bytes]], outcome: Outcome) -> None:
    """Note what the events of a stream brought, each a line; this waits for its end, to be out of the way of others."""
    try:
        for event, (came, _) in zip(events_in(line for _, line in lines), lines, strict=False):
            text, _, usage = parts_of(event)
            if text:
                outcome.chunk_times.append(came)
            if usage is not None:
                outcome.num_output = usage[0]
    except RequestError as error:
        outcome.error = outcome.error or str(error)[:200]


async def find_model(http: httpx.AsyncClient, model: str | None) -> tuple[str, int | None]:
    """Name and longest request of a model of the server. Raises ConfigError."""
    try:
        response = await http.get("/v1/models")
        response.raise_for_status()
        longest = {str(card["id"]): card.get("max_model_len") for card in response.json()["data"]}
        first = next(iter(longest))
    except (httpx.HTTPError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise ConfigError(f"base_url {http.base_url} does not list its models: {error}") from error
    name = first if model is None else model
    if name not in longest:
        raise ConfigError(f"the server has no model {model!r}; it has {', '.join(longest)}")
    max_len = longest[name]
    return name, max_len if isinstance(max_len, int) and max_len > 1 else None


async def send_when_due(
    client: StreamClient, load: Sequence[Planned], start: float, room: int, take: Callable[[Outcome], None]
) -> None:
    """Send each request when it is due after `start`, at most `room` at a time, and give each outcome to `take`."""
    seats = asyncio.Semaphore(room)

    async def send(planned: Planned) -> None:
        await asyncio.sleep(start + planned.at - time.perf_counter())
        async with seats:
            outcome = await client.send(planned)
        take(outcome)

    await asyncio.gather(*map(send, load))


async def serve_job(job: dict[str, Any]) -> None:
    """Do what another process wants done."""

    def take(outcome: Outcome) -> None:
        print(json.dumps(asdict(outcome)), flush=True)

    async with connected(Server(**job["server"])) as client:
        load = [Planned(*each) for each in job["load"]]
        await send_when_due(client, load, job["start"], job["room"], take)


if __name__ == "__main__":
    asyncio.run(serve_job(json.loads(sys.stdin.readline())))
