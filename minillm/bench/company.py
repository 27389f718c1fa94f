"""What a demanding row costs those beside it: plain rows, then the same with one row that asks for more.

A run lasts until the other rows are done: a row with a grammar, which waits for each of its tokens, takes part in every
other step and goes on alone. Its yardstick is the run of plain rows around it.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from minillm.bench.offline import machine
from minillm.config import EngineConfig
from minillm.llm import LLM
from minillm.runtime.startup import choose_device
from minillm.types import SamplingParams, StructuredOutputsParams

__all__ = ["KINDS", "run"]

KINDS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "logit_bias": {"logit_bias": dict.fromkeys(range(100, 400), -1.0)},
    "logprobs": {"logprobs": 20},
    "prompt_logprobs": {"prompt_logprobs": 20},
    "grammar": {"structured_outputs": StructuredOutputsParams(regex="[a-z ]{4000,}")},
    "all of them": {
        "repetition_penalty": 1.1,
        "logit_bias": {7: -1.0},
        "logprobs": 20,
        "structured_outputs": StructuredOutputsParams(regex="[a-z ]{4000,}"),
    },
}
"""Kinds of row. A grammar needs an end token, which models of random weights lack, and its letters outlast the run."""


def run(
    *,
    model: str,
    config: EngineConfig,
    num_rows: int = 256,
    input_len: int = 64,
    output_len: int = 128,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measure every kind, print a table and one JSON line; returns the line."""
    with LLM(model, **asdict(config)) as llm:
        draw = random.Random(config.seed)
        prompts = [[draw.randrange(5, llm.model_config.vocab_size) for _ in range(input_len)] for _ in range(num_rows)]
        has_end = bool(llm.model_config.eos_token_ids)
        kinds = {name: kind for name, kind in KINDS.items() if has_end or "structured_outputs" not in kind}
        asked = {name: row_params(kind, output_len) for name, kind in {"plain": {}, **kinds}.items()}
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        ratios: dict[str, list[float]] = {name: [] for name in asked}
        for turn in range(repeats + 1):
            for name, first in asked.items():
                took, plain = (timed(llm, prompts, each, output_len) for each in (first, asked["plain"]))
                if turn:  # the first one warms up
                    seconds[name].append(took)
                    ratios[name].append(plain / took)
        line = {
            "bench": "company",
            "model": model,
            "num_rows": num_rows,
            "input_len": input_len,
            "output_len": output_len,
            "num_runs": repeats,
            "results": [
                {
                    "row": name,
                    "output_tok_s": round((num_rows - 1) * output_len / min(seconds[name]), 1),
                    "of_plain": round(sorted(ratios[name])[len(ratios[name]) // 2], 4),
                }
                for name in asked
            ],
            "machine": machine(choose_device(config.device)),
        }
    Console().print(table_of(line))
    print(json.dumps(line), flush=True)
    return line


def row_params(kind: dict[str, Any], output_len: int) -> SamplingParams:
    """The first row's parameters."""
    ends = "structured_outputs" in kind
    return SamplingParams(temperature=0.8, seed=0, max_tokens=output_len, ignore_eos=not ends, **kind)


def timed(llm: LLM, prompts: list[list[int]], first: SamplingParams, output_len: int) -> float:
    """Seconds until all rows of a batch but the first, which are plain, are done."""
    plain = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=output_len, ignore_eos=True) for i in range(1, len(prompts))
    ]
    outputs = llm.generate(prompts, [first, *plain])
    assert all(len(output.token_ids) == output_len for output in outputs), "a row ended early: the runs do not compare"
    start = min(output.timings.arrival for output in outputs)
    return max(output.timings.finished or start for output in outputs[1:]) - start


def table_of(line: dict[str, Any]) -> Table:
    """The figures for people."""
    title = f"{line['model']} · one row beside {line['num_rows'] - 1} plain ones · {line['machine']['device']}"
    table = Table(title=title, caption=f"throughput of the other rows: median of {line['num_runs']}")
    for name in ("row", "output tok/s", "of plain"):
        table.add_column(name, justify="left" if name == "row" else "right")
    for row in line["results"]:
        table.add_row(row["row"], f"{row['output_tok_s']:,.1f}", f"{row['of_plain']:.1%}")
    return table
