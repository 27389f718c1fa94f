"""Flash Attention 2 (Dao 2023, algorithm 1) over the paged cache, for any mix of query and key lengths in one launch.

It knows no requests and no prefill: a row is some queries at the end of some keys. A program owns one tile of a row's
queries and one key head; the query heads of that group are packed into the tile, so that each key is read once:

    tile row      0 1 2 3 4 5 6 ..                grid slots of the rows, tile_queries = 4, counts 3 and 6:
    query         0 0 0 1 1 1 2 ..  (group 3)     row 0: slots 0 .. 0     row 1: slots 3 // 4 + 1 .. 9 // 4 + 2 - 1
    query head    0 1 2 0 1 2 0 ..                a row of n queries has at least ceil(n / tile_queries) slots

Shapes: T tokens, N query heads, K key/value heads, H head size, R rows, S seats, M blocks a seat can hold, B blocks,
P block size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions have no types that Python knows)

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tile", "choose_tile", "paged_attention"]

LOG2_E = 1.4426950408889634


@triton.jit
def read_pages(table_ptr, key_start, num_keys, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Blocks of the keys from `key_start` on: one number if a block holds the whole tile, else one for each key.

    Read a turn before they are needed, so that no load of keys waits for them. Nothing may be computed from them in
    the turn that reads them, not even a cast: the compiler would prefetch the numbers instead of the keys.
    """
    if BLOCK_SIZE >= TILE_KEYS:
        pages = tl.load(table_ptr + key_start // BLOCK_SIZE, mask=key_start < num_keys, other=0)
    else:
        keys = key_start + tl.arange(0, TILE_KEYS)
        pages = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < num_keys, other=0)
    return pages


@triton.jit
def read_tile(base_ptr, pages, key_start, num_keys,
              BLOCK_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr,
              HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Keys or values [TILE_KEYS, PADDED_HEAD] of one head; zero past the row's keys if MASKED.

    `key_start` is a multiple of the tile. Only a block's offset is 64-bit; that within the block is the same each turn.
    """
    keys = tl.arange(0, TILE_KEYS)
    dims = tl.arange(0, PADDED_HEAD)
    block_offsets = pages.to(tl.int64) * BLOCK_STRIDE
    if BLOCK_SIZE >= TILE_KEYS:
        pointers = base_ptr + block_offsets + ((key_start % BLOCK_SIZE + keys) * HEAD_SIZE)[:, None] + dims[None, :]
    else:
        pointers = base_ptr + block_offsets[:, None] + ((keys % BLOCK_SIZE) * HEAD_SIZE)[:, None] + dims[None, :]
    is_key = (key_start + keys < num_keys)[:, None]
    is_dim = (dims < HEAD_SIZE)[None, :]
    if MASKED:  # stale slots may hold NaN, which a weight of zero would not remove
        if PADDED_HEAD == HEAD_SIZE:
            tile = tl.load(pointers, mask=is_key, other=0.0)
        else:
            tile = tl.load(pointers, mask=is_key & is_dim, other=0.0)
    else:
        if PADDED_HEAD == HEAD_SIZE:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=is_dim, other=0.0)
    return tile


@triton.jit
def attend(q, acc, top, total, pages, positions, k_ptr, v_ptr, table_ptr, begin, end, num_keys, scale_log2,
           BLOCK_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, HEAD_SIZE: tl.constexpr,
           PADDED_HEAD: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Online softmax over keys begin .. end (multiples of the tile but for the last); MASKED at the diagonal.

    `top` is the running maximum of the scores in units of log 2, `total` the sum of 2^(score - top), both float32.
    """
    for key_start in tl.range(begin, end, TILE_KEYS, num_stages=STAGES):
        k = read_tile(k_ptr, pages, key_start, num_keys,
                      BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, MASKED)  # fmt: skip
        v = read_tile(v_ptr, pages, key_start, num_keys,
                      BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, MASKED)  # fmt: skip
        pages = read_pages(table_ptr, key_start + TILE_KEYS, num_keys, BLOCK_SIZE, TILE_KEYS)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            keys = key_start + tl.arange(0, TILE_KEYS)
            scores = tl.where(positions[:, None] >= keys[None, :], scores, float("-inf"))
        # Key 0 is in the first tile and seen by every query: top is finite from the first turn on.
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total, pages


@triton.jit
def find_row(query_starts_ptr, slot, num_rows, TILE_QUERIES: tl.constexpr):
    """The row that owns a grid slot: the last one whose first slot, start // TILE_QUERIES + index, is not beyond it.

    Counted 128 rows at a time: a binary search would wait for one load after the other.
    """
    num_before = 0
    for chunk in range(0, num_rows, 128):
        index = chunk + tl.arange(0, 128)
        starts = tl.load(query_starts_ptr + index, mask=index < num_rows, other=0)
        is_before = (starts // TILE_QUERIES + index <= slot) & (index < num_rows)
        num_before += tl.sum(is_before.to(tl.int32), 0)
    row = num_before - 1
    row_start = tl.load(query_starts_ptr + row)
    return row, row_start, slot - (row_start // TILE_QUERIES + row)


# The integer tensors are slices of a packed buffer: their alignment changes from step to step and must not recompile.
@triton.jit(
    do_not_specialize=[
        "rows_ptr", "query_starts_ptr", "context_lens_ptr", "table_stride", "num_rows",
    ]
)  # fmt: skip
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, block_tables_ptr, rows_ptr, query_starts_ptr, context_lens_ptr,
    scale_log2, table_stride, num_rows,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
    STAGES: tl.constexpr, MIN_QUERIES: tl.constexpr,
):  # fmt: skip
    """Rows of at least MIN_QUERIES queries. Grid: (slots of query tiles, key heads)."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    TILE_QUERIES: tl.constexpr = TILE_ROWS // GROUP
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    kv_head = tl.program_id(1)
    row, row_start, slot = find_row(query_starts_ptr, tl.program_id(0), num_rows, TILE_QUERIES)
    num_queries = tl.load(query_starts_ptr + row + 1) - row_start
    # The last tile of a row sees the most keys: it starts first.
    first_query = (tl.cdiv(num_queries, TILE_QUERIES) - 1 - slot) * TILE_QUERIES
    if (first_query >= 0) & (num_queries >= MIN_QUERIES):
        num_keys = tl.load(context_lens_ptr + row)
        table_ptr = block_tables_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride

        index = tl.arange(0, TILE_ROWS)
        dims = tl.arange(0, PADDED_HEAD)
        queries = first_query + index // GROUP
        heads = kv_head * GROUP + index % GROUP
        is_real = (index < TILE_QUERIES * GROUP) & (queries < num_queries)
        offsets = ((row_start + queries).to(tl.int64) * NUM_HEADS + heads)[:, None] * HEAD_SIZE + dims[None, :]
        mask = is_real[:, None] & (dims < HEAD_SIZE)[None, :]
        q = tl.load(q_ptr + offsets, mask=mask, other=0.0)

        first_position = num_keys - num_queries + first_query
        positions = first_position + index // GROUP
        whole = (first_position + 1) // TILE_KEYS * TILE_KEYS  # keys in tiles that every query sees all of
        end = tl.minimum(first_position + TILE_QUERIES, num_keys)
        k_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
        v_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
        acc = tl.zeros([TILE_ROWS, PADDED_HEAD], tl.float32)
        top = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        pages = read_pages(table_ptr, 0, num_keys, BLOCK_SIZE, TILE_KEYS)
        acc, top, total, pages = attend(
            q, acc, top, total, pages, positions, k_ptr, v_ptr, table_ptr, 0, whole, num_keys, scale_log2,
            BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, False, STAGES)  # fmt: skip
        acc, top, total, pages = attend(
            q, acc, top, total, pages, positions, k_ptr, v_ptr, table_ptr, whole, end, num_keys, scale_log2,
            BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True, STAGES)  # fmt: skip
        tl.store(out_ptr + offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tile:
    """Launch parameters. `rows` and `keys` follow from shapes and dtype alone, never from the batch: they set the order
    of a row's sums. `stages` and `max_registers` do not change a bit of them.
    """

    rows: int
    """Queries times heads of a group that a program owns."""
    keys: int
    stages: int
    """Turns of the loop whose keys and values are in flight or in use."""
    max_registers: int | None = None
    """Registers of a thread, None for all that it wants: a cap lets two programs share a multiprocessor."""

    def shared_bytes(self, padded_head: int, element_size: int) -> int:
        """Bound of the kernel's shared memory: queries, keys and values of each stage, block numbers."""
        return (self.rows + 2 * self.keys * self.stages) * padded_head * element_size + 16 * self.keys


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; under the interpreter those of a small GPU."""
    if device.type != "cuda":
        return 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; under the interpreter a few, so that small batches take every path."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


@cache
def choose_tile(group: int, head_size: int, element_size: int, block_tokens: int | None, shared_limit: int) -> Tile:
    """The tile for these shapes; `block_tokens` sets its keys, else the measured default (H100, docs/log.md).

    Raises ValueError if `block_tokens` is no power of two of at least 16 or its tile does not fit shared memory.
    """
    padded_head = max(16, triton.next_power_of_2(head_size))
    is_half = element_size == 2
    rows = max(128 if is_half else 8192 // max(128, padded_head), triton.next_power_of_2(group))
    if block_tokens is not None and (block_tokens < 16 or block_tokens & (block_tokens - 1)):
        raise ValueError(f"block_tokens must be a power of two of at least 16, not {block_tokens}")
    stages = (3, 2, 1) if is_half else (2, 1)
    tiles = [Tile(rows, keys, some) for keys in (512, 256, 128, 64, 32, 16) for some in stages]
    fitting = [tile for tile in tiles if tile.shared_bytes(padded_head, element_size) <= shared_limit]
    if not fitting:
        raise ValueError(f"no tile for head size {head_size} fits {shared_limit} bytes of shared memory")
    if block_tokens is None:
        wanted = 64 if is_half else 16  # exact float32 products hold their operands in registers
        return max(fitting, key=lambda tile: (tile.keys <= wanted, tile.stages > 1, tile.keys, tile.stages))
    for tile in fitting:
        if tile.keys == block_tokens:
            return tile
    raise ValueError(
        f"block_tokens={block_tokens} does not fit {shared_limit} bytes of shared memory with head size {head_size}: "
        f"the largest that does is {fitting[0].keys}"
    )


def paired(tile: Tile, head_size: int, element_size: int, shared_limit: int) -> Tile:
    """The same tile such that two programs share a multiprocessor and fill each other's waits; as it was if none fits.

    For many programs: short prompts gain a quarter. One program on a multiprocessor of its own is faster uncapped.
    """
    padded_head = max(16, triton.next_power_of_2(head_size))
    pair = replace(tile, stages=2, max_registers=128)
    does_fit = 2 * pair.shared_bytes(padded_head, element_size) <= shared_limit
    holds_sums = tile.rows * (padded_head + tile.keys) <= 128 * 192  # of the 128 * 256 numbers that the cap leaves
    return pair if element_size == 2 and does_fit and holds_sums else tile


def paged_attention(
    q_TNH: Tensor,
    out_TNH: Tensor,
    *,
    kv_2BKPH: Tensor,
    block_tables_SM: Tensor,
    rows_R: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    scale: float,
    min_queries: int,
    block_tokens: int | None = None,
) -> None:
    """Attention of rows with at least `min_queries` query tokens (1 or more) into their tokens of `out_TNH`.

    The grid is a bound from T and R, both known on the host: no sync, and a captured launch serves any lengths.
    """
    num_tokens, num_heads, head_size = q_TNH.shape
    _, _, num_kv_heads, block_size, _ = kv_2BKPH.shape
    num_rows = rows_R.shape[0]
    group = num_heads // num_kv_heads
    shared_limit = shared_memory(q_TNH.device)
    tile = choose_tile(group, head_size, q_TNH.element_size(), block_tokens, shared_limit)
    num_full = num_tokens // (tile.rows // group)
    if num_full * num_kv_heads > num_multiprocessors(q_TNH.device):
        tile = paired(tile, head_size, q_TNH.element_size(), shared_limit)
    attention_kernel[(num_full + num_rows, num_kv_heads)](
        q_TNH, kv_2BKPH[0], kv_2BKPH[1], out_TNH, block_tables_SM, rows_R, query_starts_R1, context_lens_R,
        scale * LOG2_E, block_tables_SM.stride(0), num_rows,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_SIZE=head_size,
        PADDED_HEAD=max(16, triton.next_power_of_2(head_size)), BLOCK_SIZE=block_size,
        TILE_ROWS=tile.rows, TILE_KEYS=tile.keys, STAGES=tile.stages, MIN_QUERIES=min_queries,
        num_warps=8, maxnreg=tile.max_registers,
    )  # fmt: skip
