"""`minillm bench kernels`: each kernel's time beside what the machine can do, a table, and one JSON line at the end.

Bandwidth-bound kernels are compared with a large copy, compute-bound ones with a large matrix product, both measured
in the same run; PyTorch's SDPA and FlashAttention 3, where they are there, run the same shapes over contiguous keys.
On a GPU a kernel's calls are captured in one graph over several copies of its data, so that neither the host nor the
L2 cache makes the figure. What the layers of a step share is prepared before. It knows no engine.

Shapes: T tokens, D hidden size, F intermediate size, N query heads, K key/value heads, H head size, R rows, P block
size, L rows of logits, V vocabulary.
"""

from __future__ import annotations

import importlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minillm.bench.yardstick import Yardstick, best_seconds, measure_yardstick

__all__ = ["run"]

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's shapes for the benchmark."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    block_size: int


@dataclass(kw_only=True)
class Case:
    """One kernel at one size. `works` do the same on different copies of the data."""

    name: str
    works: list[Work]
    num_bytes: float = 0.0
    """Bytes that must be read and written once."""
    num_flops: float = 0.0
    """FLOPs, where these and not the bytes are the bound."""
    peers: dict[str, list[Work]] = field(default_factory=dict)


LARGE = Shape(hidden=4096, ffn=14336, heads=32, kv_heads=8, head_size=128, vocab=151_936, block_size=16)
SMALL = Shape(hidden=576, ffn=1536, heads=9, kv_heads=3, head_size=64, vocab=49_152, block_size=16)
L2_BYTES = 150e6
"""Copies of the data are made until they exceed this."""
MAX_COPIES = 32

Rows = list[tuple[int, int]]
"""(queries, context) of each row, rows of one query first."""


def run() -> dict[str, Any]:
    """Measure the kernel set of this machine; print a table, then a JSON line, which is also returned."""
    is_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if is_gpu else "cpu"), torch.bfloat16 if is_gpu else torch.float32
    ops = importlib.import_module("minillm.kernels.gpu" if is_gpu else "minillm.kernels.cpu")
    torch.manual_seed(0)
    yardstick = measure_yardstick(device, dtype)
    with torch.inference_mode():
        results = [result(case, yardstick, device) for case in all_cases(ops, device, dtype)]
    line = {
        "bench": "kernels",
        "dtype": str(dtype).removeprefix("torch."),
        "results": results,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "yardstick": yardstick.as_dict(),
    }
    Console().print(table_of(line))
    print(json.dumps(line), flush=True)
    return line


def all_cases(ops: ModuleType, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases one by one: each frees its tensors before the next makes its own."""
    is_gpu = device.type == "cuda"
    shape = LARGE if is_gpu else SMALL
    maker = partial(attention_case, ops, shape, device, dtype)
    if is_gpu:
        for num_rows, context in ((1, 1000), (1, 4000), (1, 32_000), (8, 4000), (64, 1000), (256, 1000), (256, 4000)):
            yield maker(f"decode {num_rows} x {context}", [(1, context)] * num_rows)
        yield maker("decode 64 x 100..2000", [(1, 100 + 977 * i % 1900) for i in range(64)])
        yield maker("decode 256 x 200..1000", [(1, 200 + 800 * i // 255) for i in range(256)])
        for num_rows, length in ((16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16_384)):
            yield maker(f"prefill {num_rows} x {length}", [(length, length)] * num_rows)
        yield maker("prefill 2 x 8192, blocks of 64", [(8192, 8192)] * 2, block_size=64)
        yield maker("chunk 512 at 8192", [(512, 8192)])
        yield maker("8 drafts of 4 at 4000", [(4, 4000)] * 8)
        mixed = [(1, 1000)] * 64 + [(512, 2048)]
        yield maker("64 decodes + chunk 512", mixed)
        yield maker("64 decodes + chunk 512, one launch", mixed, one_launch=True)
    else:
        yield maker("decode 1 x 512", [(1, 512)])
        yield maker("decode 16 x 512", [(1, 512)] * 16)
        yield maker("prefill 1 x 512", [(512, 512)])
    for num_tokens in (1, 256, 8192) if is_gpu else (1, 16, 512):
        yield from token_cases(ops, shape, num_tokens, device, dtype)
    yield from sample_cases(ops, shape, 256 if is_gpu else 16, device, dtype)


def num_copies(num_bytes: float, device: torch.device) -> int:
    """Copies of data of this size that do not fit a GPU's L2 cache together; on a CPU one."""
    return 1 if device.type == "cpu" else min(MAX_COPIES, 1 + int(L2_BYTES / num_bytes))


def attention_case(
    ops: ModuleType,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    rows: Rows,
    *,
    block_size: int | None = None,
    one_launch: bool = False,
) -> Case:
    """Attention over blocks in random order, one layer of cache per copy."""
    block_size = block_size or shape.block_size
    counts, contexts = [count for count, _ in rows], [context for _, context in rows]
    used = [-(-context // block_size) for context in contexts]
    row_bytes = 2 * shape.kv_heads * shape.head_size * dtype.itemsize
    copies = num_copies(sum(contexts) * row_bytes, device)
    kv_size = (copies, 2, sum(used) + 1, shape.kv_heads, block_size, shape.head_size)
    kv_L2BKPH = torch.randn(kv_size, device=device, dtype=dtype)
    q_TNH = torch.randn((sum(counts), shape.heads, shape.head_size), device=device, dtype=dtype)
    steers = {
        "block_tables_SM": shuffled_tables(used).to(device),
        "rows_R": torch.arange(len(rows), dtype=torch.int32, device=device),
        "query_starts_R1": torch.tensor([0, *counts], device=device).cumsum(0).int(),
        "context_lens_R": torch.tensor(contexts, dtype=torch.int32, device=device),
        "num_decodes": counts.count(1),
        "max_context_len": max(contexts),
    }
    zeros_T = torch.zeros(len(q_TNH), dtype=torch.int32, device=device)
    prepared = ops.prepare_step(
        cos_sin_EH=torch.zeros((1, shape.head_size), device=device),
        positions_T=zeros_T,
        slots_T=zeros_T,
        kv_2BKPH=kv_L2BKPH[0],
        **steers,
    )
    work = partial(
        ops.attention,
        q_TNH,
        **steers,
        prepared=prepared,
        scale=shape.head_size**-0.5,
        max_query_len=max(counts),
        **({"one_launch": True} if one_launch else {}),
    )
    pairs = sum(count * context - count * (count - 1) // 2 for count, context in rows)
    is_decode = max(counts) == 1
    works: list[Work] = [partial(work, kv_2BKPH=kv_2BKPH) for kv_2BKPH in kv_L2BKPH]
    peers = attention_peers(rows, q_TNH, shape.kv_heads, copies) if len(set(rows)) == 1 else {}
    if device.type == "cuda" and not is_decode and not one_launch:
        peers["plain Triton"] = [partial(work, kv_2BKPH=kv_2BKPH, block_tokens=64) for kv_2BKPH in kv_L2BKPH]
    return Case(
        name=name,
        works=works,
        num_bytes=sum(contexts) * row_bytes + 2 * q_TNH.numel() * dtype.itemsize,
        num_flops=0 if is_decode else 4 * pairs * shape.heads * shape.head_size,
        peers=peers,
    )


def shuffled_tables(used: list[int]) -> Tensor:
    """Block tables [R, M] of rows with `used` blocks each, from 1 on in random order."""
    tables_RM = torch.zeros((len(used), max(used)), dtype=torch.int32)
    for table_M, blocks in zip(tables_RM, torch.split((torch.randperm(sum(used)) + 1).int(), used), strict=True):
        table_M[: len(blocks)] = blocks
    return tables_RM


def attention_peers(rows: Rows, q_TNH: Tensor, kv_heads: int, copies: int) -> dict[str, list[Work]]:
    """SDPA and FlashAttention 3 on contiguous keys; all rows are alike."""
    count, context = rows[0]
    _, heads, head_size = q_TNH.shape
    q_RnNH = q_TNH.view(len(rows), count, heads, head_size)
    kvs = [q_TNH.new_empty((2, len(rows), context, kv_heads, head_size)).normal_() for _ in range(copies)]
    peers: dict[str, list[Work]] = {}
    if count in (1, context):  # SDPA's causal mask is aligned top left
        peers["SDPA"] = [
            partial(
                torch.nn.functional.scaled_dot_product_attention,
                q_RnNH.transpose(1, 2),
                kv[0].transpose(1, 2),
                kv[1].transpose(1, 2),
                is_causal=count > 1,
                enable_gqa=heads != kv_heads,
            )
            for kv in kvs
        ]
    try:
        flash3 = importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError:
        return peers
    return peers | {"FA3": [partial(flash3, q_RnNH, kv[0], kv[1], causal=True) for kv in kvs]}


def token_cases(
    ops: ModuleType, shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """The kernels that work token by token."""
    size, (hidden, ffn) = dtype.itemsize, (shape.hidden, shape.ffn)
    make = partial(torch.randn, device=device, dtype=dtype)
    copies = num_copies(2 * num_tokens * hidden * size, device)
    xs, residual_TD, weight_D = make((copies, num_tokens, hidden)), make((num_tokens, hidden)), make((hidden,))
    moved = num_tokens * hidden * size
    works: list[Work] = [partial(ops.rms_norm, x_TD, weight_D, 1e-5) for x_TD in xs]
    yield Case(name=f"rms_norm {num_tokens} x {hidden}", works=works, num_bytes=2 * moved)
    works = [partial(ops.add_rms_norm, x_TD, residual_TD, weight_D, 1e-5) for x_TD in xs]
    yield Case(name=f"add_rms_norm {num_tokens} x {hidden}", works=works, num_bytes=4 * moved)
    copies = num_copies(3 * num_tokens * ffn * size, device)
    works = [partial(ops.silu_mul, x_T2F) for x_T2F in make((copies, num_tokens, 2 * ffn))]
    yield Case(name=f"silu_mul {num_tokens} x {ffn}", works=works, num_bytes=3 * num_tokens * ffn * size)
    yield rotary_case(ops, shape, num_tokens, device, dtype)
    yield from linear_cases(ops, shape, num_tokens, device, dtype)


def linear_cases(
    ops: ModuleType, shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """The product with gates and ups, alone and, on a GPU, where that may be one kernel, with the activation."""
    hidden, outs = shape.hidden, 2 * shape.ffn
    copies = num_copies(hidden * outs * dtype.itemsize, device)
    x_TD = torch.randn((num_tokens, hidden), device=device, dtype=dtype)
    weights = [torch.randn((outs, hidden), device=device, dtype=dtype) for _ in range(copies)]
    packed = [getattr(ops, "pack_linear", lambda w: w)(weight_OD) for weight_OD in weights]
    num_flops = 2 * num_tokens * hidden * outs if num_tokens > 256 else 0
    yield Case(
        name=f"linear {num_tokens} x {hidden} x {outs}",
        works=[partial(ops.linear, x_TD, weight, None) for weight in packed],
        num_bytes=(hidden * outs + num_tokens * (hidden + outs)) * dtype.itemsize,
        num_flops=num_flops,
    )
    if device.type == "cpu":
        return

    def two_kernels(weight_OD: Tensor) -> object:
        return ops.silu_mul(torch.nn.functional.linear(x_TD, weight_OD))

    yield Case(
        name=f"gated_linear {num_tokens} x {hidden} x {outs}",
        works=[partial(ops.gated_linear, x_TD, weight_OD, None) for weight_OD in weights],
        num_bytes=(hidden * outs + num_tokens * (hidden + outs // 2)) * dtype.itemsize,
        num_flops=num_flops,
        peers={"two kernels": [partial(two_kernels, weight_OD) for weight_OD in weights]},
    )


def rotary_case(ops: ModuleType, shape: Shape, num_tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Rotary and cache write, with q/k norm."""
    heads, kv_heads, head_size, block_size = shape.heads, shape.kv_heads, shape.head_size, shape.block_size
    width = (heads + 2 * kv_heads) * head_size
    num_blocks = -(-num_tokens // block_size) + 1
    kv_2BKPH = torch.zeros((2, num_blocks, kv_heads, block_size, head_size), device=device, dtype=dtype)
    norm_H = torch.ones(head_size, device=device, dtype=dtype)
    num_bytes = 2.0 * num_tokens * width * dtype.itemsize
    xs = torch.randn((num_copies(num_bytes, device), num_tokens, width), device=device, dtype=dtype)
    work = partial(
        ops.rotary_and_store,
        cos_sin_EH=torch.ones((num_tokens, head_size), device=device),
        positions_T=torch.arange(num_tokens, dtype=torch.int32, device=device),
        slots_T=torch.arange(num_tokens, device=device) + block_size,
        kv_2BKPH=kv_2BKPH,
        q_norm_H=norm_H,
        k_norm_H=norm_H,
        eps=1e-6,
        num_heads=heads,
        num_kv_heads=kv_heads,
    )
    works: list[Work] = [partial(work, qkv_TC) for qkv_TC in xs]
    return Case(name=f"rotary_and_store {num_tokens} x {width}", works=works, num_bytes=num_bytes)


def sample_cases(
    ops: ModuleType, shape: Shape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    """Greedy, temperature alone, and top-k with top-p."""
    logits_LV = 4 * torch.randn((num_rows, shape.vocab), device=device).to(dtype)
    params = {"greedy": (0.0, 0, 1.0), "temperature": (0.8, 0, 1.0), "top_k 50, top_p 0.9": (0.8, 50, 0.9)}
    for name, (temperature, top_k, top_p) in params.items():
        work = partial(
            ops.sample,
            logits_LV,
            temperature_L=torch.full((num_rows,), temperature, device=device),
            top_k_L=torch.full((num_rows,), top_k, dtype=torch.int32, device=device),
            top_p_L=torch.full((num_rows,), top_p, device=device),
            min_p_L=torch.zeros(num_rows, device=device),
            seeds_L=torch.arange(num_rows, device=device),
            positions_L=torch.arange(num_rows, dtype=torch.int32, device=device),
            is_random=temperature > 0,
            is_filtered=top_k > 0,
        )
        yield Case(
            name=f"sample {num_rows} x {shape.vocab}, {name}",
            works=[work],
            num_bytes=logits_LV.numel() * dtype.itemsize,
        )


def seconds_per_call(works: list[Work], device: torch.device) -> float:
    """Shortest mean time of a call; on a GPU all works are captured in one graph, at least ten calls of them."""
    calls = works * -(-10 // len(works)) if device.type == "cuda" else works

    def call_all() -> None:
        for work in calls:
            work()

    if device.type == "cpu":
        return best_seconds(call_all, device) / len(calls)
    call_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_all()
    return best_seconds(graph.replay, device) / len(calls)


def result(case: Case, yardstick: Yardstick, device: torch.device) -> dict[str, Any]:
    """One case's figures."""
    seconds = seconds_per_call(case.works, device)
    row: dict[str, Any] = {"kernel": case.name, "us": round(seconds * 1e6, 2)}
    if case.num_flops:
        rate, most = case.num_flops / seconds, yardstick.multiplied
        row["tflop_s"] = round(rate / 1e12, 3)
    else:
        rate, most = case.num_bytes / seconds, yardstick.copied
        row["tb_s"] = round(rate / 1e12, 4)
    row["of_machine"] = round(rate / most, 4)
    row["peers_us"] = {name: round(seconds_per_call(works, device) * 1e6, 2) for name, works in case.peers.items()}
    return row


def table_of(line: dict[str, Any]) -> Table:
    """The figures for people."""
    yardstick = line["yardstick"]
    rates = f"copy {yardstick['copy_tb_s']} TB/s, product {yardstick['matmul_tflop_s']} TFLOP/s"
    table = Table(title=f"kernels · {line['dtype']} · {line['device']}", caption=rates)
    table.add_column("kernel")
    for name in ("µs", "rate", "of best", "peers, µs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in line["results"]:
        rate = f"{row['tflop_s']:.3g} TFLOP/s" if "tflop_s" in row else f"{row['tb_s']:.3g} TB/s"
        peers = ", ".join(f"{name} {us:,.1f}" for name, us in row["peers_us"].items())
        table.add_row(row["kernel"], f"{row['us']:,.1f}", rate, f"{row['of_machine']:.1%}", peers)
    return table


if __name__ == "__main__":
    run()
