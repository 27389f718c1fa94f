"""`minillm bench staircase`: the time of a layer's four matrix products by the number of tokens in a step, that of gate
and up with the activation behind it.

It rises in stairs: up to the edge of one, tokens are free. The table shows the edges, and marks the sizes at which the
scheduler ends a step (`tile_steps`) with what one token more would cost. It knows no engine.

Shapes: T tokens, D inputs, O outputs.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minillm.bench.kernels import Work, num_copies, seconds_per_call
from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.model.sources import load_config, resolve
from minillm.runtime.startup import CPU_DEFAULTS, GPU_DEFAULTS, Place, choose_device, choose_dtype, kernel_set

__all__ = ["run"]

SMALL = (1, 2, 4, 8, 16, 32)
EDGES = (64, 128, 192, 256, 384, 448, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048)
"""Measured with one token less and one more."""


def run(*, model: str = "random:qwen3-0.6b", max_tokens: int = 2048) -> dict[str, Any]:
    """Measure on this machine; print a table, then a JSON line, which is also returned.

    `max_tokens`: largest edge that is measured. Raises ConfigError, and what finding the model raises.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
    config = load_config(resolve(model))
    device = choose_device("auto")
    place = Place(device, choose_dtype("auto", device), kernel_set(device))
    tile_steps = (GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS).tile_steps
    with torch.inference_mode():
        layers = linear_shapes(config)
        columns = {name: list(microseconds(place, name, shape, max_tokens)) for name, shape in layers.items()}
    results = [
        {"num_tokens": num, "us": round(sum(each), 2), "each_us": [round(us, 2) for us in each]}
        for num, each in zip(token_counts(max_tokens), zip(*columns.values(), strict=True), strict=True)
    ]
    line = {
        "bench": "staircase",
        "model": model,
        "dtype": str(place.dtype).removeprefix("torch."),
        "linears": {name: list(shape) for name, shape in layers.items()},
        "results": results,
        "tile_steps": [step for step in tile_steps if step <= max_tokens],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    Console().print(table_of(line))
    print(json.dumps(line), flush=True)
    return line


def token_counts(max_tokens: int) -> list[int]:
    """What is measured, ascending.

    >>> token_counts(64)
    [1, 2, 4, 8, 16, 32, 63, 64, 65]
    """
    counts = {*SMALL, *(edge + by for edge in EDGES if edge <= max_tokens for by in (-1, 0, 1))}
    return sorted(count for count in counts if count <= max_tokens + 1)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's products."""
    heads, kv_heads = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (heads + 2 * kv_heads, hidden),
        "out": (hidden, heads),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def microseconds(place: Place, name: str, shape: tuple[int, int], max_tokens: int) -> Iterator[float]:
    """Time of one product for each of the token counts; its weights are read from memory, not from the L2 cache."""
    ops = place.ops
    product = ops.gated_linear if name == "gate_up" else ops.linear
    make = partial(torch.randn, device=place.device, dtype=place.dtype)
    num_bytes = shape[0] * shape[1] * place.dtype.itemsize
    pack = getattr(ops, "pack_linear", lambda weight: weight)
    weights = [pack(make(shape)) for _ in range(num_copies(num_bytes, place.device))]
    x_TD = make((max_tokens + 1, shape[1]))
    for num_tokens in token_counts(max_tokens):
        works: list[Work] = [partial(product, x_TD[:num_tokens], weight_OD, None) for weight_OD in weights]
        yield 1e6 * seconds_per_call(works, place.device)


def table_of(line: dict[str, Any]) -> Table:
    """The figures for people."""
    table = Table(title=f"matrix products of a layer · {line['model']} · {line['dtype']} · {line['device']}")
    for name in ("tokens", "µs", *line["linears"], "ns each", "one more"):
        table.add_column(name, justify="right", no_wrap=True)
    us = {row["num_tokens"]: row["us"] for row in line["results"]}
    for row in line["results"]:
        num = row["num_tokens"]
        is_step = num in line["tile_steps"] and num + 1 in us
        more = f"{us[num + 1] / us[num] - 1:+.0%}" if is_step else ""
        each = [f"{value:,.1f}" for value in row["each_us"]]
        table.add_row(f"{num:,}", f"{row['us']:,.1f}", *each, f"{1e3 * row['us'] / num:,.0f}", more)
    return table
