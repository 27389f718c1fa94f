"""`minillm bench memory`: what attention and a whole prefill hold at most, measured, and how long a prompt may be.

Every figure is a peak of the allocator while the thing ran. Attention is measured beyond its inputs and outputs, a
prefill beyond the weights. The model is the classic API's small one with random weights, of fewer layers on a CPU: a
layer's activations are freed before the next one's, so they do not change the peak, but for the cache.

Shapes: R rows, T tokens of all rows, N heads, H head size, P block size.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minillm.bench.peak_memory import peak_bytes
from minillm.bench.pictures import Panel, check_picture, save_picture
from minillm.classic import Configs, KVCache, MiniLLM
from minillm.errors import ConfigError
from minillm.kernels import reference
from minillm.runtime.kv_cache import free_memory
from minillm.runtime.startup import choose_device, choose_dtype, kernel_set

__all__ = ["run"]

MIB = 2**20
BLOCK_SIZE = 16
NUM_ROWS = 2
FIRST_LENGTH, LAST_LENGTH = 256, 32_768
PREFILL_LENGTHS = (2048, 8192)
CHUNK_SIZES = (512, 2048, None)
STANDARD, FLASH = "standard", "flash"
DOCUMENT_MIB = {256: 4.0, 512: 16.0, 1024: 64.0, 2048: 256.0}
"""Standard attention in the table of the first documents: the formula for one matrix of float32 scores."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far a run goes."""

    max_length: int
    limit_bytes: int
    """What cache and activations may take in the search for the longest prompt."""
    num_layers: int
    longest: int
    """Where that search ends."""


def run(*, max_length: int = LAST_LENGTH, picture: Path | None = None) -> dict[str, Any]:
    """Measure prompts of up to `max_length` tokens; print tables and a JSON line, which is also returned.

    Raises ConfigError.
    """
    if not FIRST_LENGTH <= max_length <= 2**20:
        raise ConfigError(f"max_length must be an integer from {FIRST_LENGTH} to {2**20}, not {max_length}")
    check_picture(picture)
    device = choose_device("auto")
    is_gpu = device.type == "cuda"
    bounds = Bounds(
        max_length=max_length,
        limit_bytes=(4096 if is_gpu else 256) * MIB,
        num_layers=8 if is_gpu else 2,
        longest=2**19 if is_gpu else LAST_LENGTH,
    )
    line = measure(device, replace(bounds, longest=max(max_length, bounds.longest)))
    for table in tables_of(line):
        Console().print(table)
    if picture is not None:
        save_picture(picture, panels_of(line), f"minillm bench memory · {line['device']} · {line['dtype']}")
    print(json.dumps(line), flush=True)
    return line


def measure(device: torch.device, bounds: Bounds) -> dict[str, Any]:
    """All figures."""
    dtype = choose_dtype("auto", device)
    with torch.no_grad():
        attention = list(attention_rows(device, dtype, bounds.max_length))
        model = make_model(bounds)
        lengths = [length for length in PREFILL_LENGTHS if length < bounds.max_length] + [bounds.max_length]
        prefill = [prefill_row(model, length, size) for length in lengths for size in CHUNK_SIZES]
        kinds = [(STANDARD, None), (FLASH, None), (FLASH, 2048), (FLASH, 512)]
        longest = [longest_row(model, bounds, kind, size) for kind, size in kinds]
    free, total = free_memory(device)
    return {
        "bench": "memory",
        "attention": attention,
        "prefill": prefill,
        "longest": longest,
        "limit_mib": bounds.limit_bytes // MIB,
        "layers": bounds.num_layers,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "yardstick": {"free_gib": round(free / 2**30, 2), "total_gib": round(total / 2**30, 2)},
    }


def attention_rows(device: torch.device, dtype: torch.dtype, max_length: int) -> Iterator[dict[str, Any]]:
    """MiB that attention takes beyond inputs and outputs, 2 rows and 8 heads of 64 as in the documents."""
    flash: Callable[..., torch.Tensor] = kernel_set(device).attention
    standard_mib: float | None = 0.0
    for length in takewhile(lambda n: n <= max_length, (FIRST_LENGTH << i for i in range(32))):
        inputs = attention_inputs(length, device, dtype)
        flash_mib = attention_mib(flash, inputs, device)
        free, _ = free_memory(device)
        if standard_mib is not None:  # its memory grows fourfold: what will not fit is not tried
            does_fit = 4.5 * standard_mib * MIB < 0.9 * free
            standard_mib = attention_mib(reference.attention, inputs, device) if does_fit else None
        saved = None if standard_mib is None else round(1 - flash_mib / standard_mib, 4)
        yield {"length": length, "standard_mib": standard_mib, "flash_mib": flash_mib, "saved": saved}


def attention_inputs(length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a causal pass over rows of `length` tokens, nothing cached before."""
    num_heads, head_size, num_blocks = 8, 64, -(-length // BLOCK_SIZE)
    return {
        "q_TNH": torch.randn(NUM_ROWS * length, num_heads, head_size, device=device, dtype=dtype),
        "kv_2BKPH": torch.randn(2, NUM_ROWS * num_blocks, num_heads, BLOCK_SIZE, head_size, device=device, dtype=dtype),
        "block_tables_SM": torch.arange(NUM_ROWS * num_blocks, dtype=torch.int32, device=device).view(NUM_ROWS, -1),
        "rows_R": torch.arange(NUM_ROWS, dtype=torch.int32, device=device),
        "query_starts_R1": torch.arange(NUM_ROWS + 1, dtype=torch.int32, device=device) * length,
        "context_lens_R": torch.full((NUM_ROWS,), length, dtype=torch.int32, device=device),
        "scale": head_size**-0.5,
        "num_decodes": 0,
        "max_query_len": length,
        "max_context_len": length,
    }


def attention_mib(attention: Callable[..., torch.Tensor], inputs: dict[str, Any], device: torch.device) -> float:
    """Peak of one call beyond its inputs and its result, which is made first."""
    q_TNH = inputs["q_TNH"]
    if device.type == "cuda":
        attention(**inputs)  # compiles
    return mib(peak_bytes(lambda: attention(**inputs), device) - q_TNH.numel() * q_TNH.element_size())


def make_model(bounds: Bounds) -> MiniLLM:
    """The small model, for prompts of any length."""
    config = Configs.small()
    config.num_layers, config.max_position = bounds.num_layers, bounds.longest
    return MiniLLM(config)


def prefill_bytes(model: MiniLLM, length: int, chunk_size: int | None, kind: str) -> tuple[int, int]:
    """What the cache of a prompt takes, and the measured peak of computing it up to the logits of its last token."""
    device = model.settings.place.device
    attention = model.attention(kind == FLASH, None)
    prompt = torch.randint(model.config.vocab_size, (length,), device=device)
    cache = KVCache(model.settings, batch_size=1, max_length=length)
    cache.reserve([length])
    activations = peak_bytes(lambda: model.last_logits([prompt], cache, chunk_size, attention), device)
    return cache.num_bytes, activations


def prefill_row(model: MiniLLM, length: int, chunk_size: int | None) -> dict[str, Any]:
    """MiB of a prefill."""
    cache, activations = prefill_bytes(model, length, chunk_size, FLASH)
    return {"length": length, "chunk_size": chunk_size, "activations_mib": mib(activations), "cache_mib": mib(cache)}


def longest_row(model: MiniLLM, bounds: Bounds, kind: str, chunk_size: int | None) -> dict[str, Any]:
    """The longest prompt whose measured peak stays within the limit, of lengths 2^n and 3 * 2^n."""
    found, peak = 0, 0
    for length in sorted({size << i for size in (1024, 1536) for i in range(20)}):
        if length > bounds.longest:
            break
        needed = sum(prefill_bytes(model, length, chunk_size, kind))
        if needed > bounds.limit_bytes:
            break
        found, peak = length, needed
    return {"attention": kind, "chunk_size": chunk_size, "length": found, "peak_mib": mib(peak)}


def mib(num_bytes: int) -> float:
    """Bytes in MiB."""
    return round(num_bytes / MIB, 3)


def tables_of(line: dict[str, Any]) -> list[Table]:
    """The figures for people."""
    where = f"{line['device']}, {line['dtype']}"
    attention = Table("tokens", "standard, MiB", "flash, MiB", "saved", "document, MiB", title=f"attention · {where}")
    for row in line["attention"]:
        does_fit = row["standard_mib"] is not None
        shown = (f"{row['standard_mib']:,.2f}", f"{row['saved']:.1%}") if does_fit else ("does not fit", "")
        document = DOCUMENT_MIB.get(row["length"])
        flash = f"{row['flash_mib']:,.2f}"
        attention.add_row(
            f"{row['length']:,}", shown[0], flash, shown[1], "" if document is None else f"{document:.2f}"
        )
    prefill = Table("tokens", "chunk", "activations, MiB", "cache, MiB", title=f"prefill, {line['layers']} layers")
    for row in line["prefill"]:
        figures = (f"{row['activations_mib']:,.1f}", f"{row['cache_mib']:,.1f}")
        prefill.add_row(f"{row['length']:,}", chunk_name(row["chunk_size"]), *figures)
    longest = Table("attention", "chunk", "tokens", "peak, MiB", title=f"longest prompt within {line['limit_mib']} MiB")
    for row in line["longest"]:
        figures = (f"{row['length']:,}", f"{row['peak_mib']:,.1f}")
        longest.add_row(row["attention"], chunk_name(row["chunk_size"]), *figures)
    return [attention, prefill, longest]


def chunk_name(size: int | None) -> str:
    """A chunk size for people."""
    return "none" if size is None else f"{size:,}"


def panels_of(line: dict[str, Any]) -> list[Panel]:
    """Attention and prefill by length."""
    attention = {
        kind: [(row["length"], row[f"{kind}_mib"]) for row in line["attention"] if row[f"{kind}_mib"]]
        for kind in (STANDARD, FLASH)
    }
    prefill = {
        f"chunk {chunk_name(size)}": [
            (row["length"], row["activations_mib"]) for row in line["prefill"] if row["chunk_size"] == size
        ]
        for size in CHUNK_SIZES
    }
    return [
        Panel(title="attention", x_label="tokens", y_label="peak beyond q, k, v and o, MiB", lines=drawn(attention)),
        Panel(title="prefill", x_label="tokens", y_label="peak beyond weights and cache, MiB", lines=drawn(prefill)),
    ]


def drawn(lines: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """Those lines that have points: zero has no place on a logarithmic axis."""
    return {label: points for label, points in lines.items() if points}
