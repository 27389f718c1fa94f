"""Attention of rows with one query token: split-KV decoding (Dao et al. 2023, "Flash-Decoding") over the paged cache.

A row's keys are cut into segments whose size follows from the row's own length, and a row is the sum of its segments
in their order: it depends on nothing else, not on its neighbours or the batch. How many programs share a row is a
matter of speed alone; each walks its segments in one pipelined loop and starts afresh at each.

    keys             0 ... 128 ... 256 ... 384 ... 500
    segments         |  a   |   b   |   c   |  d  |
    one program      ((a + b) + c) + d                       in registers, written to the output
    two programs     |   p, which stores a, b   |   q, which stores c, d  |      then merge: ((a + b) + c) + d

Where rows are too few to keep a GPU busy however their lengths differ, or their number is not known at launch, the keys
of the batch are dealt: a row longer than an even share of them all is cut. The device does so, as a graph knows no
lengths.

    lengths          3000, 200, 700: an even share of four is 975 keys, of row 0 six segments of 192
    programs         | row 0 | row 0 | row 0 | row 1 | row 2 | none | none |

It starts while the kernel before it, which writes the new keys, still runs (programmatic dependent launch): until
`gdc_wait` it reads only lengths and tables, which must be there before that kernel. It knows no requests. The small
side (query heads of a group) is the N of each product, the keys are its M.

Shapes: T tokens, N query heads, K key/value heads, H head size, R rows, S seats, M blocks a seat can hold, B blocks,
P block size, G most segments of a row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (Triton functions have no types that Python knows)

from __future__ import annotations

import math
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
DEALT_PROGRAMS = 3
"""Programs for each multiprocessor, if each row and key head had one, below which keys are dealt. Of more the longest
row is small beside the batch, and a merge costs more than it saves."""
MAX_FEW_ROWS = 8
"""Most rows of which two programs for each multiprocessor are enough."""


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


@triton.jit
def deal(query_starts_ptr, context_lens_ptr, program, num_rows, num_shares, PADDED_ROWS: tl.constexpr,
         MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, TILE_KEYS: tl.constexpr):  # fmt: skip
    """(row, which of the row's programs this is, how many there are, segments of each); no row: num_rows or more.

    A program takes as many segments as make up an even share of the batch's keys, so there are at most
    num_rows + num_shares programs.
    """
    rows = tl.arange(0, PADDED_ROWS)
    is_row = rows < num_rows
    starts = tl.load(query_starts_ptr + rows, mask=is_row, other=0)
    is_decode = tl.load(query_starts_ptr + rows + 1, mask=is_row, other=0) - starts == 1
    lens = tl.load(context_lens_ptr + rows, mask=is_decode, other=0)
    share = tl.maximum(tl.cdiv(tl.sum(lens, 0), num_shares), 1)
    sizes = segment_size(lens, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)
    num_own = tl.cdiv(share, sizes)
    num_programs = tl.cdiv(tl.cdiv(lens, sizes), num_own)
    row = tl.sum((tl.cumsum(num_programs, 0) <= program).to(tl.int32), 0)
    place = program - tl.sum(tl.where(rows < row, num_programs, 0), 0)
    is_own = rows == row
    return row, place, tl.sum(tl.where(is_own, num_programs, 0), 0), tl.sum(tl.where(is_own, num_own, 0), 0)


@triton.jit(do_not_specialize=[
    "rows_ptr", "query_starts_ptr", "context_lens_ptr", "table_stride", "num_rows", "num_shares",
])  # fmt: skip
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, block_tables_ptr, rows_ptr, query_starts_ptr,
    context_lens_ptr, scale_log2, table_stride, num_rows, num_shares,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    PADDED_GROUP: tl.constexpr, PADDED_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, STAGES: tl.constexpr,
    IS_DEALT: tl.constexpr, IS_SORTED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (key heads, rows), or if IS_DEALT (key heads, rows + shares); row r is token r. IS_SORTED: the longest row
    starts first.

    Writes the output, or for a row that several programs share acc [R, N, G, H], top and total [R, N, G] of each
    segment. If IS_DEALT, other rows' first total becomes 0, which no sum of weights is.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    if OVERLAPS:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    place = 0
    is_whole = True
    if IS_DEALT:
        row, place, num_programs, num_own = deal(query_starts_ptr, context_lens_ptr, row, num_rows, num_shares,
                                                 PADDED_ROWS, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)  # fmt: skip
        if row >= num_rows:
            # Of a batch without decodes all programs end here, and what follows waits for this kernel alone.
            if OVERLAPS:
                gdc_wait()
            return
        is_whole = num_programs == 1
    if IS_SORTED:
        row = row_of_rank(context_lens_ptr, row, num_rows, PADDED_ROWS)
    is_decode = tl.load(query_starts_ptr + row + 1) - tl.load(query_starts_ptr + row) == 1
    num_keys = tl.load(context_lens_ptr + row)
    size = segment_size(num_keys, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)
    segment = 0
    begin = 0
    end = num_keys
    if IS_DEALT:
        segment = place * num_own
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
    sum_acc, sum_top, sum_total = acc, top, total  # of the segments before
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
            if not is_whole:
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
    if is_whole:
        out = tl.trans(sum_acc / sum_total[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], out, mask=mask)
        if IS_DEALT:
            tl.store(total_ptr + heads * MAX_SEGMENTS, tl.zeros([PADDED_GROUP], tl.float32), mask=group < GROUP)


@triton.jit(do_not_specialize=["query_starts_ptr", "context_lens_ptr"])
def merge_kernel(
    acc_ptr, top_ptr, total_ptr, out_ptr, query_starts_ptr, context_lens_ptr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, TILE_KEYS: tl.constexpr,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, NUM_NEW: tl.constexpr, HEADS: tl.constexpr,
    BATCH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, heads / HEADS): fold the partial results of a row's segments in their order, behind that of NUM_NEW
    new keys (0 or 1) which are in no segment. Without new keys, rows whose first total is 0 are passed over."""
    if OVERLAPS:
        gdc_launch_dependents()
    row = tl.program_id(0)
    is_decode = tl.load(query_starts_ptr + row + 1) - tl.load(query_starts_ptr + row) == 1
    num_keys = tl.load(context_lens_ptr + row) - NUM_NEW
    if OVERLAPS:
        gdc_wait()
    if not is_decode:
        return
    first_head = row.to(tl.int64) * NUM_HEADS + tl.program_id(1) * HEADS
    if NUM_NEW == 0:
        if tl.load(total_ptr + first_head * MAX_SEGMENTS) == 0:
            return
    head = first_head + tl.arange(0, HEADS)
    dims = tl.arange(0, PADDED_HEAD)
    sum_acc = tl.zeros([PADDED_HEAD, HEADS], tl.float32)
    sum_top = tl.full([HEADS], float("-inf"), tl.float32)
    sum_total = tl.zeros([HEADS], tl.float32)
    num_parts = NUM_NEW + tl.cdiv(num_keys, segment_size(num_keys, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS))
    for first in tl.range(0, num_parts, BATCH, num_stages=1):
        accs = ()
        tops = ()
        totals = ()
        for i in tl.static_range(BATCH):  # all asked for before the first is used
            part = head * (MAX_SEGMENTS + NUM_NEW) + first + i
            is_part = tl.full([HEADS], first + i, tl.int32) < num_parts
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


def choose_shares(num_tokens: int, num_decodes: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """Even shares into which each key head's keys are dealt: four programs for each multiprocessor (two for rows so few
    that a merge costs more than programs of different sizes), or 1 for not at all.

    In a step with other tokens than those of `num_decodes` rows, that is only the most rows that there can be.
    """
    is_full = num_decodes * num_kv_heads >= DEALT_PROGRAMS * num_multiprocessors
    if is_full and num_tokens == num_decodes:
        return 1
    num_programs = (2 if num_decodes <= MAX_FEW_ROWS else 4) * num_multiprocessors
    return -(-num_programs // num_kv_heads)


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it ends: programmatic dependent launch, Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Options of a launch that can start while the kernel before it ends, for a kernel with the parameter OVERLAPS.

    All its programs must call `gdc_wait` before they write, and before they read what a kernel of a layer writes; in
    every launch one of them must, as the next kernel waits for this one and for none before it.
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
    shares: int | None = None,
) -> None:
    """Attention of those of the first `num_decodes` rows with one query token, the row's number, into `out_TNH`.

    `shares`, among which each key head's keys are dealt (1: each row has one program; None: chosen from the number of
    rows), changes no bit of the result.
    """
    device = q_TNH.device
    num_tokens, num_heads, head_size = q_TNH.shape
    _, _, num_kv_heads, block_size, _ = kv_2BKPH.shape
    is_half = q_TNH.element_size() == 2
    constants = segment_constants(num_heads, num_kv_heads, head_size, q_TNH.dtype)
    if shares is None:
        shares = choose_shares(num_tokens, num_decodes, num_kv_heads, num_multiprocessors(device))
    is_dealt, is_sorted = shares > 1, shares == 1 and num_decodes <= MAX_SORTED_ROWS
    parts = Parts(out_TNH, out_TNH, out_TNH)  # where no row is shared there are no partial results
    if is_dealt:
        parts = Parts.empty((num_decodes, num_heads, constants["MAX_SEGMENTS"], head_size), device)
    decode_kernel[(num_kv_heads, num_decodes + (shares if is_dealt else 0))](
        q_TNH, kv_2BKPH[0], kv_2BKPH[1], out_TNH, *parts, block_tables_SM, rows_R,
        query_starts_R1, context_lens_R, scale * LOG2_E, block_tables_SM.stride(0), num_decodes, shares, **constants,
        NUM_KV_HEADS=num_kv_heads, PADDED_GROUP=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        PADDED_ROWS=max(16, triton.next_power_of_2(num_decodes)) if is_dealt or is_sorted else 16,
        BLOCK_SIZE=block_size, STAGES=3 if is_half else 2, IS_DEALT=is_dealt, IS_SORTED=is_sorted,
        num_warps=4 if is_half else 8, **overlap_options(device),
    )  # fmt: skip
    if is_dealt:
        merge_parts(parts, out_TNH, query_starts_R1, context_lens_R, constants, num_heads // num_kv_heads)


def merge_parts(
    parts: Parts,
    out_TNH: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    constants: dict[str, int],
    group: int = 1,
    num_new: int = 0,
) -> None:
    """The sum of each row's parts into `out_TNH`, for rows of one token; the first `num_new` hold new keys.

    `group`: query heads that share a key head. Of many rows most have nothing to merge: fewer programs find that out.
    """
    num_rows, num_heads = parts.top_RNG.shape[:2]
    heads = math.gcd(group, 4) if num_rows > MAX_SORTED_ROWS else 1
    merge_kernel[(num_rows, num_heads // heads)](
        *parts, out_TNH, query_starts_R1, context_lens_R, **constants, NUM_NEW=num_new, HEADS=heads, BATCH=8,
        num_warps=heads, **overlap_options(out_TNH.device),
    )  # fmt: skip
