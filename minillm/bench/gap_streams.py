"""Streams that go on until they are given up, and when their chunks came: read by this process or by several.

One process takes 6 ms to read a chunk of 64 streams each, which would be taken for the server's. `python -m
minillm.bench.gap_streams` reads a share of them: a job as one line of JSON on standard input, then a word a line, each
answered by a line of JSON, or by {"error": ..} once a stream has ended:

    chunk    {} as soon as each stream has had another chunk
    times    {"times": [[.., ..], ..]}, of each stream's chunks so far
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any, Protocol

from minillm.bench.client_processes import LINE_BYTES, client_process
from minillm.bench.latency import Outcome
from minillm.bench.stream_client import Planned, Server, StreamClient, connected
from minillm.engine.collector import keep_what_is_there
from minillm.errors import ConfigError

__all__ = ["Streams", "own_streams", "shared_streams"]


class Streams(Protocol):
    """Running requests. Both raise ConfigError if one has ended."""

    async def next_chunk(self) -> None:
        """Wait until each has had another chunk."""

    async def times(self) -> list[list[float]]:
        """When the chunks of each came."""


class OwnStreams:
    """Streams that this process reads."""

    def __init__(self, client: StreamClient, load: Sequence[Planned]) -> None:
        self._times: list[list[float]] = [[] for _ in load]
        sent = zip(load, self._times, strict=True)
        self.tasks = [asyncio.create_task(client.send(planned, times.append)) for planned, times in sent]

    async def next_chunk(self) -> None:
        lengths = [len(times) for times in self._times]
        check_running(self.tasks)
        while any(len(times) <= length for times, length in zip(self._times, lengths, strict=True)):
            await asyncio.sleep(0.01)
            check_running(self.tasks)

    async def times(self) -> list[list[float]]:
        check_running(self.tasks)
        return self._times


@asynccontextmanager
async def own_streams(client: StreamClient, load: Sequence[Planned]) -> AsyncIterator[Streams]:
    """Send a load and read it here, until the block ends."""
    streams = OwnStreams(client, load)
    try:
        yield streams
    finally:
        for task in streams.tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*streams.tasks, return_exceptions=True)


class SharedStreams:
    """Streams that other processes read."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def next_chunk(self) -> None:
        await self._ask("chunk")

    async def times(self) -> list[list[float]]:
        return [times for answer in await self._ask("times") for times in answer["times"]]

    async def _ask(self, word: str) -> list[dict[str, Any]]:
        return await asyncio.gather(*(ask(process, word) for process in self._processes))


@asynccontextmanager
async def shared_streams(server: Server, load: Sequence[Planned], num_processes: int) -> AsyncIterator[Streams]:
    """Send a load and read it in several processes, until the block ends."""
    async with AsyncExitStack() as stack:
        jobs = [{"server": asdict(server), "load": load[i::num_processes]} for i in range(num_processes)]
        yield SharedStreams([await stack.enter_async_context(reader(job)) for job in jobs if job["load"]])


@asynccontextmanager
async def reader(job: dict[str, Any]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process at a job, ended with the block."""
    async with client_process("minillm.bench.gap_streams") as process:
        await tell(process, json.dumps(job))
        yield process


async def tell(process: asyncio.subprocess.Process, line: str) -> None:
    """Send a process a line. Raises ConfigError if it is no more."""
    assert process.stdin is not None
    try:
        process.stdin.write(line.encode() + b"\n")
        await process.stdin.drain()
    except ConnectionError as error:
        raise await ended(process) from error


async def ask(process: asyncio.subprocess.Process, word: str) -> dict[str, Any]:
    """A process's answer to a word. Raises ConfigError if it failed."""
    await tell(process, word)
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise await ended(process)
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer


async def ended(process: asyncio.subprocess.Process) -> ConfigError:
    """What to raise about a process that is no more."""
    return ConfigError(f"a client process ended too early, with status {await process.wait()}")


def check_running(tasks: Sequence[asyncio.Task[Outcome]]) -> None:
    """Raise ConfigError if a stream has ended."""
    for task in tasks:
        if task.done():
            error = task.result().error or "all its tokens came: raise output_len, or the server's max_model_len"
            raise ConfigError(f"a stream ended too early: {error}")


async def read_share() -> None:
    """Do what another process asks for, until it closes standard input or is no more."""
    lines = asyncio.StreamReader(limit=LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    job = json.loads(await lines.readline())
    async with connected(Server(**job["server"])) as client:
        async with own_streams(client, [Planned(*each) for each in job["load"]]) as streams:
            word = await lines.readline()
            while word:
                answer, following = asyncio.create_task(answer_to(word, streams)), asyncio.create_task(lines.readline())
                await asyncio.wait((answer, following), return_when=asyncio.FIRST_COMPLETED)
                if following.done():  # nobody asks again before an answer: this is the end
                    answer.cancel()
                    return
                print(json.dumps(answer.result()), flush=True)
                word = await following


async def answer_to(word: bytes, streams: Streams) -> dict[str, Any]:
    """What a word is answered by."""
    try:
        if word.strip() == b"times":
            return {"times": await streams.times()}
        await streams.next_chunk()
        return {}
    except ConfigError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    keep_what_is_there()
    try:
        asyncio.run(read_share())
    except BrokenPipeError:  # the one that asked is no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more as it ends
