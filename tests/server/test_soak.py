"""64 clients at once, some of which leave in the middle: every stream that stays ends, nothing stays behind.

`make soak` does this for ten minutes and watches the memory of the process, in which the clients are too.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from minillm.config import EngineConfig
from tests.server.live import TINY, serving, threaded

NUM_CLIENTS = 64
PATIENCE = 600.0
"""Seconds: requests of a lower priority wait long on a busy machine; those that are lost would wait for ever."""
ENGINE = EngineConfig(device="cpu", dtype="float32", max_model_len=256, num_kv_blocks=400, max_num_seqs=32)
WARM_SECONDS, SOAK_SECONDS = 60.0, 600.0
MAX_GROWTH = 1.02


def body_of(draw: random.Random) -> dict[str, Any]:
    """A request: a prompt that others may share the beginning of, and some length."""
    prompt = [7] * draw.choice((1, 16, 40)) + [draw.randrange(500) for _ in range(draw.randrange(60))]
    return {
        "prompt": prompt,
        "max_tokens": draw.randrange(1, 100),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": draw.choice((1, 1, 1, 2)),
        "user": draw.choice("abc"),
        "priority": draw.choice((0, 0, 1)),
    }


async def ask(client: httpx.AsyncClient, draw: random.Random) -> str:
    """One request, which is left in the middle now and then; how it went."""
    body, leaves_after = body_of(draw), draw.randrange(200)
    num_events, usage = 0, None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            num_events += bool(line)
            if num_events > leaves_after:
                return "left"
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: ")).get("usage", usage)
    assert line == "" or line == "data: [DONE]"
    assert usage is not None and usage["completion_tokens"] == body["max_tokens"] * body["n"], "tokens were lost"
    return "done"


async def load(url: str, goes_on: Callable[[int], bool]) -> Counter[str]:
    """Keep 64 requests under way while `goes_on`, which is told how many have ended."""
    outcomes: Counter[str] = Counter()

    async def run(seed: int) -> None:
        draw = random.Random(seed)
        limits = httpx.Limits(max_keepalive_connections=1)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            while goes_on(outcomes.total()):
                outcomes[await ask(client, draw)] += 1

    await asyncio.gather(*(run(seed) for seed in range(NUM_CLIENTS)))
    return outcomes


def test_64_streams_with_disconnects() -> None:
    with serving(TINY, ENGINE) as live:
        outcomes = asyncio.run(load(live.url, lambda num_ended: num_ended < 120))
        assert outcomes["done"] > 40 and outcomes["left"] > 8, outcomes
        live.wait_idle()
        assert live.engine.num_of_user == {}


@pytest.mark.soak
def test_64_streams_for_ten_minutes() -> None:
    process, start, warm = psutil.Process(), time.monotonic(), []

    def goes_on(num_ended: int) -> bool:
        seconds = time.monotonic() - start
        if seconds > WARM_SECONDS and not warm:
            warm.append(process.memory_info().rss)
        return seconds < SOAK_SECONDS

    with serving(TINY, ENGINE, threaded(stall_seconds=20.0)) as live:
        outcomes = asyncio.run(load(live.url, goes_on))
        live.wait_idle()
        growth = process.memory_info().rss / warm[0]
        print(f"\nsoak: {dict(outcomes)}, {warm[0] / 2**20:.0f} MiB after a minute, then times {growth:.4f}")
        assert live.client.get("/health").status_code == 200
        assert growth <= MAX_GROWTH
