"""benchmark_chunked_prefill: how fast a model reads a prompt, by chunk size. It measures times, not memory.

`minillm bench memory` measures memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from minillm.classic.config import check_chunk_size
from minillm.classic.model import MiniLLM
from minillm.types import check_int

__all__ = ["benchmark_chunked_prefill"]


def benchmark_chunked_prefill(
    model: MiniLLM,
    seq_len: int = 512,
    chunk_sizes: Sequence[int | None] = (64, 128, 256, None),
    batch_size: int = 1,
    repeats: int = 2,
) -> dict[int | None, dict[str, float]]:
    """By chunk size (None: whole prompt): the best of `repeats`, in seconds and in prompt tokens_per_second.

    Prints a table. Raises RequestError, ConfigError.
    """
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("repeats", repeats)):
        check_int(name, value, 1, 2**20)
    ids = list(torch.randint(model.config.vocab_size, (batch_size, seq_len)))
    attention = model.attention(None, None)
    results: dict[int | None, dict[str, float]] = {}
    table = Table("chunk", "seconds", "tokens/s", title=f"prefill of {batch_size} x {seq_len} tokens")
    for chunk_size in chunk_sizes:
        if chunk_size is not None:
            check_chunk_size(chunk_size)
        best = float("inf")
        for _ in range(repeats):
            cache = model.make_cache(seq_len, batch_size)
            start = time.perf_counter()
            model.last_logits(ids, cache, chunk_size, attention).argmax(-1).tolist()  # waits for a GPU
            best = min(best, time.perf_counter() - start)
        rate = batch_size * seq_len / best
        results[chunk_size] = {"seconds": best, "tokens_per_second": rate}
        table.add_row("whole" if chunk_size is None else str(chunk_size), f"{best:.3f}", f"{rate:,.0f}")
    Console().print(table)
    return results
