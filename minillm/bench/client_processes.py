"""A benchmark's load shared out among client processes, since one cannot read many thousand events a second."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict

from minillm.bench.latency import Outcome
from minillm.bench.stream_client import Planned, Server
from minillm.errors import ConfigError

__all__ = ["LINE_BYTES", "START_SECONDS", "client_process", "send_from_processes"]

START_SECONDS = 3.0
"""Until the load begins: time for the processes to start."""
LINE_BYTES = 2**26


async def send_from_processes(
    server: Server, load: Sequence[Planned], num_processes: int, room: int, take: Callable[[Outcome], None]
) -> None:
    """Send a load from several processes, at most `room` requests at a time, and give each outcome to `take`.

    Each process has every `num_processes`th request and its share of the room. Raises ConfigError if one fails.
    """
    start = time.perf_counter() + START_SECONDS
    shares = [load[i::num_processes] for i in range(num_processes)]
    rooms = [len(range(i, room, num_processes)) for i in range(num_processes)]
    jobs = [
        {"server": asdict(server), "load": share, "start": start, "room": each}
        for share, each in zip(shares, rooms, strict=True)
        if share
    ]
    await asyncio.gather(*(run_process(json.dumps(job), take) for job in jobs))


async def run_process(job: str, take: Callable[[Outcome], None]) -> None:
    """One client process, from its job to its end."""
    async with client_process("minillm.bench.stream_client") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(job.encode() + b"\n")
        process.stdin.close()
        async for line in process.stdout:
            take(Outcome(**json.loads(line)))
        if await process.wait():
            raise ConfigError(f"a client process ended with status {process.returncode}; its error is above")


@asynccontextmanager
async def client_process(module: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that runs a module, to be told and asked by lines; it ends with the block at the latest."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdin=pipe, stdout=pipe, limit=LINE_BYTES
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
