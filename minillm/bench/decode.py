"""`minillm bench decode`: time per token with and without a KV cache, and the tokens per second of 1 and 16 sequences.

The model is the classic API's small one with random weights. It knows no scheduler: tokens are made pass by pass.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minillm.bench.pictures import Panel, check_picture, save_picture
from minillm.bench.yardstick import measure_yardstick, synchronize
from minillm.classic import Configs, GenerationConfig, KVCache, MiniLLM
from minillm.classic.generation import generate_tokens
from minillm.errors import ConfigError

__all__ = ["run"]

FIRST_CONTEXT, LAST_CONTEXT = 64, 2048
NUM_SEQUENCES = (1, 16)
PROMPT_LEN, NUM_NEW_TOKENS = 128, 64
REPEATS = 5
DOCUMENT_RATE = 148.0
"""Tokens per second of the first documents, which name no machine."""


def run(*, max_context: int = LAST_CONTEXT, picture: Path | None = None) -> dict[str, Any]:
    """Measure contexts from 64 tokens to `max_context`; print tables and a JSON line, which is also returned.

    Raises ConfigError.
    """
    if not FIRST_CONTEXT <= max_context <= 2**17:
        raise ConfigError(f"max_context must be an integer from {FIRST_CONTEXT} to {2**17}, not {max_context}")
    check_picture(picture)
    config = Configs.small()
    config.max_position = max(config.max_position, max_context + 1)
    line = measure(MiniLLM(config), max_context)
    for table in tables_of(line):
        Console().print(table)
    if picture is not None:
        panel = Panel(
            title="time of the next token",
            x_label="tokens before it",
            y_label="ms",
            lines={
                name: [(row["context"], row[f"{key}_ms"]) for row in line["tokens"]]
                for name, key in (("KV cache", "cached"), ("no cache", "uncached"))
            },
        )
        save_picture(picture, [panel], f"minillm bench decode · {line['device']} · {line['dtype']}")
    print(json.dumps(line), flush=True)
    return line


def measure(model: MiniLLM, max_context: int) -> dict[str, Any]:
    """All figures."""
    device, dtype = model.settings.place.device, model.settings.place.dtype
    contexts = [FIRST_CONTEXT << i for i in range(32) if FIRST_CONTEXT << i <= max_context]
    yardstick = measure_yardstick(device, dtype)
    step_bytes = model.config.num_step_params * dtype.itemsize
    rows = [token_row(model, context, step_bytes / yardstick.copied) for context in contexts]
    return {
        "bench": "decode",
        "tokens": rows,
        "rates": [rate_row(model, num) for num in NUM_SEQUENCES],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "yardstick": yardstick.as_dict(),
    }


def token_row(model: MiniLLM, context: int, read_seconds: float) -> dict[str, Any]:
    """Milliseconds of the token after `context` others; `read_seconds`: a copy's time for as many bytes as weights."""
    ids = torch.randint(model.config.vocab_size, (context + 1,))
    device = model.settings.place.device

    def made() -> KVCache:
        return KVCache(model.settings, batch_size=1, max_length=context + 1)

    def filled() -> KVCache:
        cache = made()
        model.last_logits([ids[:-1]], cache, None, None)
        return cache

    cached = shortest_seconds(filled, lambda cache: model.last_logits([ids[-1:]], cache, None, None), device)
    uncached = shortest_seconds(made, lambda cache: model.last_logits([ids], cache, None, None), device)
    return {
        "context": context,
        "cached_ms": round(cached * 1e3, 3),
        "uncached_ms": round(uncached * 1e3, 3),
        "cached_of_machine": round(read_seconds / cached, 4),
    }


def shortest_seconds(prepare: Callable[[], KVCache], work: Callable[[KVCache], object], device: torch.device) -> float:
    """Shortest time of `work`, after one run to warm up; `prepare` is not timed."""
    work(prepare())
    best = float("inf")
    for _ in range(REPEATS):
        cache = prepare()
        synchronize(device)
        start = time.perf_counter()
        work(cache)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def rate_row(model: MiniLLM, num_sequences: int) -> dict[str, Any]:
    """New tokens per second of sequences that are generated together, of all of them and of the decode alone."""
    prompts = list(torch.randint(model.config.vocab_size, (num_sequences, PROMPT_LEN)))
    config = GenerationConfig(max_new_tokens=NUM_NEW_TOKENS, temperature=0.0)
    rates = []
    for _ in range(3):
        _, timing = generate_tokens(model, prompts, config)
        decoded = num_sequences * (NUM_NEW_TOKENS - 1) / timing["decode_time"]
        rates.append((timing["tokens_per_second"], decoded))
    whole, decode = max(rates[1:])
    return {
        "sequences": num_sequences,
        "prompt_len": PROMPT_LEN,
        "new_tokens": NUM_NEW_TOKENS,
        "tokens_per_second": round(whole, 1),
        "decode_tokens_per_second": round(decode, 1),
    }


def tables_of(line: dict[str, Any]) -> list[Table]:
    """The figures for people."""
    where = f"{line['device']}, {line['dtype']}"
    tokens = Table("context", "with cache, ms", "without, ms", "of a copy", title=f"time of the next token · {where}")
    for row in line["tokens"]:
        times = (f"{row['cached_ms']:.2f}", f"{row['uncached_ms']:.2f}")
        tokens.add_row(f"{row['context']:,}", *times, f"{row['cached_of_machine']:.1%}")
    title = f"prompts of {PROMPT_LEN} tokens, {NUM_NEW_TOKENS} new ones each"
    rates = Table("sequences", "tokens/s", "tokens/s, decode alone", title=title)
    for row in line["rates"]:
        figures = (f"{row['tokens_per_second']:,.0f}", f"{row['decode_tokens_per_second']:,.0f}")
        rates.add_row(str(row["sequences"]), *figures)
    rates.caption = f"the first documents say {DOCUMENT_RATE:.0f}, on a GPU that they do not name"
    return [tokens, rates]
