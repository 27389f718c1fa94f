"""Attention of rows with one query token: split-KV decoding (Dao et al. 2023, "Flash-Decoding") over the paged cache.

A row's keys are cut into segments whose size follows from the row's own length, and a row is the sum of its segments
in their order: it depends on nothing else, not on its neighbours, the batch or the bound on lengths. How many programs
share a row is a matter of speed alone; each walks its segments in one pipelined loop and starts afresh at each.

    keys             0 ... 128 ... 256 ... 384 ... 500
    segments         |  a   |   b   |   c   |  d  |
    one program      ((a + b) + c) + d                       in registers, written to the output
    two programs     |   p, which stores a, b   |   q, which stores c, d  |      then merge: ((a + b) + c) + d

It starts while the kernel before it, which writes the new keys, still runs (programmatic dependent launch): until
`gdc_wait` it reads only lengths and tables, which must be there before that kernel. It knows no requests. The small
side (query heads of a group) is the N of each product, the keys are its M.

Shapes: T tokens, N query heads, K key/value heads, H head size, R rows, S seats, M blocks a seat can hold, B blocks,
P block size, G most segments of a row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (Triton functions have no types that Python knows)

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minillm.kernels.attention import LOG2_E, num_multiprocessors, read_pages, read_tile

__all__ = [
    "Parts",
    "can_overlap",
    "choose_shares",
    "decode_attention",
    "max_segments",
    "merge_parts",
    "overlap_options",
    "segment_constants",
]

MIN_SEGMENT = 128
"""Keys of a segment, if the row needs no larger ones. Smaller: more programs for one short row, more to merge."""
MAX_SORTED_ROWS = 128
"""Most rows whose order by length is worth finding: of more, the hardware's own balancing leaves no gap."""


class Parts(NamedTuple):
    """Partial results of segments, float32: weighted sums of values, and of the weights their top score and sum."""

    acc_RNGH: Tensor
    top_RNG: Tensor
    total_RNG: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], device: torch.device) -> Parts:
        """Memory for (rows, heads, most segments of a row, head size)."""
        acc_RNGH = torch.empty(shape, dtype=torch.float32, device=device)
        return cls(acc_RNGH, *(torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in range(2)))


@triton.jit
def segment_size(num_keys, MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Keys per segment of a row: whole tiles, at least MIN_SEGMENT, at most MAX_SEGMENTS segments."""
    return tl.maximum(MIN_SEGMENT, tl.cdiv(tl.cdiv(num_keys, MAX_SEGMENTS), TILE_KEYS) * TILE_KEYS)


@triton.jit
def fold(sum_acc, sum_top, sum_total, acc, top, total):
    """Add a segment's partial softmax [H, heads] to that of the segments before.

    Tops are whole numbers, so both factors are powers of two and the products exact: the sum is rounded once, whether
    or not the compiler fuses them, and a row comes out the same however many programs shared it.
    """
    new_top = tl.maximum(sum_top, top)
    shrink = tl.exp2(sum_top - new_top)
    own_shrink = tl.exp2(top - new_top)
    sum_acc = sum_acc * shrink[None, :] + acc * own_shrink[None, :]
    return sum_acc, new_top, sum_total * shrink + total * own_shrink


@triton.jit
def row_of_rank(context_lens_ptr, rank, num_rows, PADDED_ROWS: tl.constexpr):
    """The row before which `rank` rows come if longer ones come first, and of equals the first."""
    rows = tl.arange(0, PADDED_ROWS)
    lens = tl.load(context_lens_ptr + rows, mask=rows < num_rows, other=0)
    ranks = tl.zeros([PADDED_ROWS], tl.int32)
    for chunk in tl.range(0, num_rows, 32, num_stages=1):
        others = chunk + tl.arange(0, 32)
        other_lens = tl.load(context_lens_ptr + others, mask=others < num_rows, other=-1)
        is_before = (other_lens[None, :] > lens[:, None]) | (
            (other_lens[None, :] == lens[:, None]) & (others[None, :] < rows[:, None])
        )
        ranks += tl.sum(is_before.to(tl.int32), 1)
    return tl.sum(tl.where((ranks == rank) & (rows < num_rows), rows, 0), 0)


@triton.jit(do_not_specialize=["rows_ptr", "query_starts_ptr", "context_lens_ptr", "table_stride", "num_rows"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, block_tables_ptr, rows_ptr, query_starts_ptr,
    context_lens_ptr, scale_log2, table_stride, num_rows,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    PADDED_GROUP: tl.constexpr, PADDED_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, STAGES: tl.constexpr,
    IS_SHARED: tl.constexpr, IS_SORTED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (key heads, shares of a row, rows); row r is token r. IS_SORTED: the longest row starts first.

    Writes the output, or if IS_SHARED acc [R, N, G, H], top and total [R, N, G] of each segment.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    if OVERLAPS:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    row = tl.program_id(2)
    if IS_SORTED:
        row = row_of_rank(context_lens_ptr, row, num_rows, PADDED_ROWS)
    is_decode = tl.load(query_starts_ptr + row + 1) - tl.load(query_starts_ptr + row) == 1
    num_keys = tl.load(context_lens_ptr + row)
    size = segment_size(num_keys, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)
    num_own = tl.cdiv(tl.cdiv(num_keys, size), tl.num_programs(1))
    segment = tl.program_id(1) * num_own
    begin = segment * size
    end = tl.minimum(begin + num_own * size, num_keys)
    table_ptr = block_tables_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride
    pages = read_pages(table_ptr, begin, end, BLOCK_SIZE, TILE_KEYS)
    if OVERLAPS:
        gdc_wait()
    if not is_decode:
        return

    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, PADDED_HEAD)
    heads = row.to(tl.int64) * NUM_HEADS + kv_head * GROUP + group
    mask = (group < GROUP)[:, None] & (dims < HEAD_SIZE)[None, :]
    q = tl.load(q_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
    q = tl.trans(q)
    k_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    v_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    acc = tl.zeros([PADDED_HEAD, PADDED_GROUP], tl.float32)
    top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    if not IS_SHARED:  # the sums of the segments before
        sum_acc, sum_top, sum_total = acc, top, total
    segment_end = begin + size
    for key_start in tl.range(begin, end, TILE_KEYS, num_stages=STAGES):
        k = read_tile(k_ptr, pages, key_start, end,
                      BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
        v = read_tile(v_ptr, pages, key_start, end,
                      BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
        pages = read_pages(table_ptr, key_start + TILE_KEYS, end, BLOCK_SIZE, TILE_KEYS)
        scores = tl.dot(k, q, input_precision="ieee") * scale_log2
        scores = tl.where((key_start + tl.arange(0, TILE_KEYS) < end)[:, None], scores, float("-inf"))
        new_top = tl.ceil(tl.maximum(top, tl.max(scores, 0)))
        weights = tl.exp2(scores - new_top[None, :]).to(v.dtype)
        shrink = tl.exp2(top - new_top)
        # Summed as rounded: the largest weight is not quite 1, but a key that outweighs all others must come out as 1.
        total = total * shrink + tl.sum(weights.to(tl.float32), 0)
        acc = tl.dot(tl.trans(v), weights, acc * shrink[None, :], input_precision="ieee")
        top = new_top
        if key_start + TILE_KEYS >= tl.minimum(segment_end, end):
            if IS_SHARED:
                parts = heads * MAX_SEGMENTS + segment
                tl.store(acc_ptr + parts[:, None] * HEAD_SIZE + dims[None, :], tl.trans(acc), mask=mask)
                tl.store(top_ptr + parts, top, mask=group < GROUP)
                tl.store(total_ptr + parts, total, mask=group < GROUP)
                segment += 1
            else:
                sum_acc, sum_top, sum_total = fold(sum_acc, sum_top, sum_total, acc, top, total)
            acc = tl.zeros([PADDED_HEAD, PADDED_GROUP], tl.float32)
            top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
            total = tl.zeros([PADDED_GROUP], tl.float32)
            segment_end += size
    if not IS_SHARED:
        out = tl.trans(sum_acc / sum_total[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["query_starts_ptr", "context_lens_ptr"])
def merge_kernel(
    acc_ptr, top_ptr, total_ptr, out_ptr, query_starts_ptr, context_lens_ptr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, TILE_KEYS: tl.constexpr,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, NUM_NEW: tl.constexpr, BATCH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, heads): fold the partial results of a row's segments in their order, behind that of NUM_NEW new keys
    (0 or 1) which are in no segment."""
    if OVERLAPS:
        gdc_launch_dependents()
    row = tl.program_id(0)
    is_decode = tl.load(query_starts_ptr + row + 1) - tl.load(query_starts_ptr + row) == 1
    num_keys = tl.load(context_lens_ptr + row) - NUM_NEW
    if OVERLAPS:
        gdc_wait()
    if not is_decode:
        return
    head = row.to(tl.int64) * NUM_HEADS + tl.program_id(1) + tl.arange(0, 1)
    dims = tl.arange(0, PADDED_HEAD)
    sum_acc = tl.zeros([PADDED_HEAD, 1], tl.float32)
    sum_top = tl.full([1], float("-inf"), tl.float32)
    sum_total = tl.zeros([1], tl.float32)
    num_parts = NUM_NEW + tl.cdiv(num_keys, segment_size(num_keys, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS))
    for first in tl.range(0, num_parts, BATCH, num_stages=1):
        accs = ()
        tops = ()
        totals = ()
        for i in tl.static_range(BATCH):  # all asked for before the first is used
            index = first + i + tl.arange(0, 1)
            part, is_part = head * (MAX_SEGMENTS + NUM_NEW) + index, index < num_parts
            is_dim = (dims[:, None] < HEAD_SIZE) & is_part[None, :]
            accs = accs + (tl.load(acc_ptr + part[None, :] * HEAD_SIZE + dims[:, None], mask=is_dim, other=0.0),)
            tops = tops + (tl.load(top_ptr + part, mask=is_part, other=float("-inf")),)
            totals = totals + (tl.load(total_ptr + part, mask=is_part, other=0.0),)
        for i in tl.static_range(BATCH):
            sum_acc, sum_top, sum_total = fold(sum_acc, sum_top, sum_total, accs[i], tops[i], totals[i])
    out = (sum_acc / sum_total[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head[None, :] * HEAD_SIZE + dims[:, None], out, mask=dims[:, None] < HEAD_SIZE)


def max_segments(num_kv_heads: int) -> int:
    """Most segments of a row: a power of two such that one long row alone gives nearly all of a GPU a program."""
    return min(128, max(16, int(triton.next_power_of_2(triton.cdiv(128, num_kv_heads)))))


def choose_shares(num_programs: int, num_multiprocessors: int) -> int:
    """Programs that share a row, if one for each row and key head made `num_programs`.

    One where those occupy most of the GPU: merging costs more than a few idle multiprocessors. Else two for each.
    """
    return 1 if 3 * num_programs >= 2 * num_multiprocessors else triton.cdiv(2 * num_multiprocessors, num_programs)


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it ends: programmatic dependent launch, Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Options of a launch that can start while the kernel before it ends, for a kernel with the parameter OVERLAPS.

    All its programs must call `gdc_wait` before they write, and before they read what a kernel of a layer writes.
    """
    return {"OVERLAPS": True, "launch_pdl": True} if can_overlap(device) else {"OVERLAPS": False}


def segment_constants(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """What the kernels that share a row must agree on."""
    padded_head = max(16, triton.next_power_of_2(head_size))
    return {
        "NUM_HEADS": num_heads, "HEAD_SIZE": head_size, "PADDED_HEAD": padded_head,
        "TILE_KEYS": max(16, min(128, (8192 if dtype.itemsize == 2 else 2048) // padded_head)),
        "MIN_SEGMENT": MIN_SEGMENT, "MAX_SEGMENTS": max_segments(num_kv_heads),
    }  # fmt: skip


def decode_attention(
    q_TNH: Tensor,
    out_TNH: Tensor,
    *,
    kv_2BKPH: Tensor,
    block_tables_SM: Tensor,
    rows_R: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    scale: float,
    num_decodes: int,
    max_context_len: int,
    shares: int | None = None,
) -> None:
    """Attention of those of the first `num_decodes` rows with one query token, the row's number, into `out_TNH`.

    `max_context_len` bounds those rows' contexts. Neither it nor `shares`, the programs that share a row (None: chosen
    from the number of rows), changes a bit of the result.
    """
    device = q_TNH.device
    _, num_heads, head_size = q_TNH.shape
    _, _, num_kv_heads, block_size, _ = kv_2BKPH.shape
    is_half = q_TNH.element_size() == 2
    constants = segment_constants(num_heads, num_kv_heads, head_size, q_TNH.dtype)
    most = constants["MAX_SEGMENTS"]
    if shares is None:
        shares = choose_shares(num_decodes * num_kv_heads, num_multiprocessors(device))
    shares = min(shares, most, triton.cdiv(max_context_len, MIN_SEGMENT))
    is_shared, is_sorted = shares > 1, shares == 1 and num_decodes <= MAX_SORTED_ROWS
    parts = Parts(out_TNH, out_TNH, out_TNH)  # where no row is shared there are no partial results
    if is_shared:
        parts = Parts.empty((num_decodes, num_heads, most, head_size), device)
    decode_kernel[(num_kv_heads, shares, num_decodes)](
        q_TNH, kv_2BKPH[0], kv_2BKPH[1], out_TNH, *parts, block_tables_SM, rows_R,
        query_starts_R1, context_lens_R, scale * LOG2_E, block_tables_SM.stride(0), num_decodes, **constants,
        NUM_KV_HEADS=num_kv_heads, PADDED_GROUP=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        PADDED_ROWS=max(16, triton.next_power_of_2(num_decodes)) if is_sorted else 16, BLOCK_SIZE=block_size,
        STAGES=3 if is_half else 2, IS_SHARED=is_shared, IS_SORTED=is_sorted,
        num_warps=4 if is_half else 8, **overlap_options(device),
    )  # fmt: skip
    if is_shared:
        merge_parts(parts, out_TNH, query_starts_R1, context_lens_R, constants)


def merge_parts(
    parts: Parts,
    out_TNH: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    constants: dict[str, int],
    num_new: int = 0,
) -> None:
    """The sum of each row's parts into `out_TNH`, for rows of one token; the first `num_new` hold new keys."""
    num_rows, num_heads = parts.top_RNG.shape[:2]
    merge_kernel[(num_rows, num_heads)](
        *parts, out_TNH, query_starts_R1, context_lens_R, **constants, NUM_NEW=num_new, BATCH=8, num_warps=1,
        **overlap_options(out_TNH.device),
    )  # fmt: skip
