"""`minillm bench speculation`: tokens per second with drafts and without, for one request at a time and for many.

The prompts are the ten of `speculation_prompts.py`, which ask to summarise and to edit; random weights would repeat
themselves, which is no measure. Engines take turns, run by run; prompts come again as often as a batch needs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from minillm.bench.offline import machine
from minillm.bench.speculation_prompts import PROMPTS, asked
from minillm.config import NGRAM, EngineConfig
from minillm.llm import LLM
from minillm.runtime.startup import choose_device
from minillm.types import RequestOutput, SamplingParams

__all__ = ["run"]

BATCH_SIZES = (1, 64, 256)


def run(
    *,
    model: str = "smollm2",
    config: EngineConfig | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    max_tokens: int = 128,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure each batch size with and without drafts; print a table, then a JSON line, which is also returned.

    Raises ConfigError, and what loading the model raises.
    """
    config = replace(config or EngineConfig(enable_prefix_caching=False), recorded_steps=0)
    on = config if config.speculative else replace(config, speculative=NGRAM)
    off = replace(on, speculative=None, num_drafts=None, draft_device=None)
    # Both fit on one device: each takes half of what a single one would.
    share = config.gpu_memory_utilization / 2
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    with LLM(model, **asdict(replace(off, gpu_memory_utilization=share))) as plain:
        both = 2 * share if choose_device(config.device).type == "cuda" else share
        with LLM(model, **asdict(replace(on, gpu_memory_utilization=both))) as drafting:
            results = [measure(plain, drafting, size, params, repeats) for size in batch_sizes]
    line = {
        "bench": "speculation",
        "model": model,
        "speculative": on.speculative,
        "num_drafts": on.max_drafts,
        "max_tokens": max_tokens,
        "repeats": repeats,
        "results": results,
        "machine": machine(choose_device(config.device)),
    }
    Console().print(table_of(line))
    print(json.dumps(line), flush=True)
    return line


def measure(plain: LLM, drafting: LLM, size: int, params: SamplingParams, repeats: int) -> dict[str, Any]:
    """Medians of runs by turns, and what became of the drafts. One request at a time is all ten, one by one."""
    num_requests = max(size, len(PROMPTS)) if size > 1 else len(PROMPTS)
    prompts = asked(plain)
    batch = [prompts[i % len(prompts)] for i in range(num_requests)]
    groups = [batch] if size > 1 else [[prompt] for prompt in batch]
    rates: tuple[list[float], list[float]] = ([], [])
    outputs: list[list[RequestOutput]] = [[], []]
    for repeat in range(repeats + 1):  # the first run warms up
        for i, llm in enumerate((plain, drafting)):
            start = time.perf_counter()
            outputs[i] = [output for group in groups for output in llm.generate(group, params)]
            seconds = time.perf_counter() - start
            if repeat:
                rates[i].append(sum(len(output.token_ids) for output in outputs[i]) / seconds)
    timings = [output.timings for output in outputs[1]]
    num_drafts, num_steps = sum(t.num_drafts for t in timings), sum(t.num_verifications for t in timings)
    num_accepted = sum(t.num_accepted_drafts for t in timings)
    off, on = statistics.median(rates[0]), statistics.median(rates[1])
    same = [a.token_ids == b.token_ids for a, b in zip(*outputs, strict=True)]
    return {
        "batch_size": size,
        "plain_tok_s": round(off, 1),
        "drafting_tok_s": round(on, 1),
        "speedup": round(on / off, 3),
        "num_drafts": num_drafts,
        "acceptance_rate": round(num_accepted / num_drafts, 3) if num_drafts else None,
        "mean_accepted_length": round(1 + num_accepted / num_steps, 2) if num_steps else None,
        "share_of_equal_outputs": round(sum(same) / len(same), 3),
    }


def table_of(line: dict[str, Any]) -> Table:
    """The figures for people."""
    table = Table(title=f"{line['model']} · {line['speculative']} · {line['machine']['device']}")
    names = list(line["results"][0])
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in line["results"]:
        table.add_row(*("-" if row[name] is None else str(row[name]) for name in names))
    return table
