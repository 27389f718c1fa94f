"""Many requests and a cache that holds one: all end, with the tokens that they have when nobody else is there."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from minillm.config import EngineConfig
from tests.server.live import Live, serving

MAX_LEN = 256
BLOCK_SIZE = 16
NUM_REQUESTS = 64


def body_of(i: int) -> dict[str, Any]:
    """Prompts and lengths of all kinds, up to the longest that there can be."""
    num_prompt = 1 + i * 37 % 200
    num_output = MAX_LEN - num_prompt if i % 8 == 0 else 1 + i % 40
    prompt = [(i * 7 + at) % 500 for at in range(num_prompt)]
    return {"prompt": prompt, "max_tokens": num_output, "temperature": 0, "ignore_eos": True, "user": "ab"[i % 2]}


async def ask_all(live: Live) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(base_url=live.url, timeout=300) as client:
        answers = [client.post("/v1/completions", json=body_of(i)) for i in range(NUM_REQUESTS)]
        return [answer.json() for answer in await asyncio.gather(*answers)]


def test_64_requests_in_a_cache_of_one() -> None:
    roomy = EngineConfig(device="cpu", dtype="float32", max_model_len=MAX_LEN, block_size=BLOCK_SIZE, num_kv_blocks=512)
    tight = EngineConfig(
        device="cpu",
        dtype="float32",
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        num_kv_blocks=MAX_LEN // BLOCK_SIZE,
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )
    texts = []
    for engine in (roomy, tight):
        with serving(engine=engine) as live:
            answers = asyncio.run(ask_all(live))
            live.wait_idle()
        texts.append([answer["choices"][0]["text"] for answer in answers])
        num_preemptions = sum(answer["timings"]["preemptions"] for answer in answers)
    assert texts[0] == texts[1]
    assert num_preemptions > 0, "the tight cache was not tight"
