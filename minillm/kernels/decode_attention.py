"""Attention of rows with one query token: split-KV decoding (Dao et al. 2023, "Flash-Decoding") over the paged cache.

A row is the sum of its keys' segments, in their order, whoever computes them (`dealing`): each program walks the
segments of its item in one pipelined loop and starts afresh at each.

    keys             0 ... 128 ... 256 ... 384 ... 500
    segments         |  a   |   b   |   c   |  d  |
    one item         ((a + b) + c) + d                       in registers, written to the output
    two items        |   p, which stores a, b   |   q, which stores c, d  |      then merge: ((a + b) + c) + d

It starts while the kernel before it, which writes the new keys, still runs (programmatic dependent launch): until
`gdc_wait` it reads only items and tables, which must be there before that kernel. It knows no requests. The small
side (query heads of a group) is the N of each product, the keys are its M.

Shapes: T tokens, N query heads, K key/value heads, H head size, R rows, S seats, M blocks a seat can hold, B blocks,
P block size, C cut rows, G most segments of a row.
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

from minillm.kernels.attention import LOG2_E, read_pages, read_tile
from minillm.kernels.dealing import NUM_COLUMNS, Deal, segment_constants, segment_size

__all__ = ["Parts", "can_overlap", "decode_attention", "head_constants", "merge_parts", "overlap_options"]

MAX_SPLIT_TOKENS = 128
"""Most tokens of a step whose rows' heads are merged by a program each: of larger steps most have nothing to merge."""


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
def read_item(items_ptr, item, max_items, block_tables_ptr, table_stride,
              BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr):  # fmt: skip
    """An item's row, place among the cut rows, keys begin .. end, keys of a segment, table, and first pages; no item:
    `end` is 0, and only `begin` is sure to be too."""
    is_item = item < max_items
    item_ptr = items_ptr + item * NUM_COLUMNS
    row = tl.load(item_ptr, mask=is_item, other=0)
    seat = tl.load(item_ptr + 1, mask=is_item, other=0)
    cut = tl.load(item_ptr + 2, mask=is_item, other=-1)
    begin = tl.load(item_ptr + 3, mask=is_item, other=0)
    end = tl.load(item_ptr + 4, mask=is_item, other=0)
    size = tl.load(item_ptr + 5, mask=is_item, other=0)
    table_ptr = block_tables_ptr + seat.to(tl.int64) * table_stride
    return row, cut, begin, end, size, table_ptr, read_pages(table_ptr, begin, end, BLOCK_SIZE, TILE_KEYS)


@triton.jit
def attend_item(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, scale_log2,
    kv_head, row, cut, begin, end, size, table_ptr, pages,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    PADDED_GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, MAX_SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr, HAS_CUTS: tl.constexpr,
):  # fmt: skip
    """Writes the output of an item of one key head, or for a cut row acc, top and total of each of its segments."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, PADDED_HEAD)
    mask = (group < GROUP)[:, None] & (dims < HEAD_SIZE)[None, :]
    heads = row.to(tl.int64) * NUM_HEADS + kv_head * GROUP + group
    q = tl.load(q_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
    q = tl.trans(q)
    acc = tl.zeros([PADDED_HEAD, PADDED_GROUP], tl.float32)
    top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    sum_acc, sum_top, sum_total = acc, top, total  # of the segments before
    is_whole = True
    parts = heads
    if HAS_CUTS:
        is_whole = cut < 0
        parts = (cut.to(tl.int64) * NUM_HEADS + kv_head * GROUP + group) * MAX_SEGMENTS + begin // size
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
                tl.store(acc_ptr + parts[:, None] * HEAD_SIZE + dims[None, :], tl.trans(acc), mask=mask)
                tl.store(top_ptr + parts, top, mask=group < GROUP)
                tl.store(total_ptr + parts, total, mask=group < GROUP)
                parts += 1
            else:
                sum_acc, sum_top, sum_total = fold(sum_acc, sum_top, sum_total, acc, top, total)
            acc = tl.zeros([PADDED_HEAD, PADDED_GROUP], tl.float32)
            top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
            total = tl.zeros([PADDED_GROUP], tl.float32)
            segment_end += size
    if is_whole:
        out = tl.trans(sum_acc / sum_total[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["max_items", "table_stride"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, items_ptr, block_tables_ptr,
    scale_log2, max_items, table_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    PADDED_GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, MAX_SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr, HAS_CUTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (key heads, items); row r is token r. HAS_CUTS: fewer programs, which take the items by turns.

    Writes the output, or for a cut row acc [C, N, G, H], top and total [C, N, G] of each segment.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    row, cut, begin, end, size, table_ptr, pages = read_item(
        items_ptr, item, max_items, block_tables_ptr, table_stride, BLOCK_SIZE, TILE_KEYS)  # fmt: skip
    if OVERLAPS:  # where there are no items it is all that is done: what follows waits for this kernel alone
        gdc_wait()
    k_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    v_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    if HAS_CUTS:
        while end > 0:
            attend_item(q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, scale_log2,
                        kv_head, row, cut, begin, end, size, table_ptr, pages,
                        NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PADDED_HEAD, PADDED_GROUP, BLOCK_SIZE, TILE_KEYS,
                        MAX_SEGMENTS, STAGES, HAS_CUTS)  # fmt: skip
            item += tl.num_programs(1)
            row, cut, begin, end, size, table_ptr, pages = read_item(
                items_ptr, item, max_items, block_tables_ptr, table_stride, BLOCK_SIZE, TILE_KEYS)  # fmt: skip
    else:
        if end > 0:
            attend_item(q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, scale_log2,
                        kv_head, row, cut, begin, end, size, table_ptr, pages,
                        NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PADDED_HEAD, PADDED_GROUP, BLOCK_SIZE, TILE_KEYS,
                        MAX_SEGMENTS, STAGES, HAS_CUTS)  # fmt: skip


@triton.jit(do_not_specialize=["context_lens_ptr"])
def merge_kernel(
    acc_ptr, top_ptr, total_ptr, out_ptr, cut_rows_ptr, context_lens_ptr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, TILE_KEYS: tl.constexpr,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, NUM_NEW: tl.constexpr, HEADS: tl.constexpr,
    BATCH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (cut rows, heads / HEADS): fold the partial results of a row's segments in their order. With NUM_NEW, behind
    that of the new key, which is in no segment, and of all rows."""
    if OVERLAPS:
        gdc_launch_dependents()
    cut = tl.program_id(0)
    row = cut
    if NUM_NEW == 0:
        row = tl.load(cut_rows_ptr + cut)
    num_keys = tl.load(context_lens_ptr + row, mask=row >= 0, other=0) - NUM_NEW
    if OVERLAPS:
        gdc_wait()
    if row < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
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
            part = (cut.to(tl.int64) * NUM_HEADS + head) * (MAX_SEGMENTS + NUM_NEW) + first + i
            is_part = tl.full([HEADS], first + i, tl.int32) < num_parts
            is_dim = (dims[:, None] < HEAD_SIZE) & is_part[None, :]
            accs = accs + (tl.load(acc_ptr + part[None, :] * HEAD_SIZE + dims[:, None], mask=is_dim, other=0.0),)
            tops = tops + (tl.load(top_ptr + part, mask=is_part, other=float("-inf")),)
            totals = totals + (tl.load(total_ptr + part, mask=is_part, other=0.0),)
        for i in tl.static_range(BATCH):
            sum_acc, sum_top, sum_total = fold(sum_acc, sum_top, sum_total, accs[i], tops[i], totals[i])
    out = (sum_acc / sum_total[None, :]).to(out_ptr.dtype.element_ty)
    offsets = (row.to(tl.int64) * NUM_HEADS + head)[None, :] * HEAD_SIZE + dims[:, None]
    tl.store(out_ptr + offsets, out, mask=dims[:, None] < HEAD_SIZE)


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


def head_constants(num_heads: int, head_size: int) -> dict[str, int]:
    """What the kernels of a row's parts and their merge have in common."""
    return {
        "NUM_HEADS": num_heads, "HEAD_SIZE": head_size, "PADDED_HEAD": max(16, triton.next_power_of_2(head_size)),
    }  # fmt: skip


def decode_attention(
    q_TNH: Tensor,
    out_TNH: Tensor,
    dealt: Deal,
    *,
    kv_2BKPH: Tensor,
    block_tables_SM: Tensor,
    context_lens_R: Tensor,
    scale: float,
    overlaps: bool = True,
) -> None:
    """Attention of the rows that were dealt, row r of token r, into `out_TNH`.

    `overlaps`: it may start before the kernel before it ends, which did not deal.
    """
    device = q_TNH.device
    num_tokens, num_heads, head_size = q_TNH.shape
    _, _, num_kv_heads, block_size, _ = kv_2BKPH.shape
    is_half = q_TNH.element_size() == 2
    constants = head_constants(num_heads, head_size)
    segments = segment_constants(num_kv_heads, head_size, kv_2BKPH.dtype)
    num_cut = len(dealt.cut_rows_C)
    parts = Parts(out_TNH, out_TNH, out_TNH)  # where no row is cut there are no partial results
    if num_cut:
        parts = Parts.empty((num_cut, num_heads, segments["MAX_SEGMENTS"], head_size), device)
    decode_kernel[(num_kv_heads, dealt.num_programs)](
        q_TNH, kv_2BKPH[0], kv_2BKPH[1], out_TNH, *parts, dealt.items_I6, block_tables_SM,
        scale * LOG2_E, len(dealt.items_I6), block_tables_SM.stride(0), **constants, NUM_KV_HEADS=num_kv_heads,
        PADDED_GROUP=max(16, triton.next_power_of_2(num_heads // num_kv_heads)), BLOCK_SIZE=block_size,
        TILE_KEYS=segments["TILE_KEYS"], MAX_SEGMENTS=segments["MAX_SEGMENTS"], STAGES=3 if is_half else 2,
        HAS_CUTS=num_cut > 0, num_warps=4 if is_half else 8,
        **(overlap_options(device) if overlaps else {"OVERLAPS": False}),
    )  # fmt: skip
    if num_cut:
        heads = 1 if num_tokens <= MAX_SPLIT_TOKENS else math.gcd(num_heads // num_kv_heads, 4)
        merge_parts(parts, out_TNH, context_lens_R, segments, dealt.cut_rows_C, heads)


def merge_parts(
    parts: Parts,
    out_TNH: Tensor,
    context_lens_R: Tensor,
    segments: dict[str, int],
    cut_rows_C: Tensor | None,
    heads: int = 1,
) -> None:
    """The sum of each cut row's parts into `out_TNH`; without `cut_rows_C` of every row, its new key in the first part.

    `segments`: those of `segment_constants`. `heads`: of one program.
    """
    num_cut, num_heads = parts.top_RNG.shape[:2]
    merge_kernel[(num_cut, num_heads // heads)](
        *parts, out_TNH, context_lens_R if cut_rows_C is None else cut_rows_C, context_lens_R,
        **head_constants(num_heads, out_TNH.shape[2]), **segments, NUM_NEW=int(cut_rows_C is None), HEADS=heads,
        BATCH=8, num_warps=heads, **overlap_options(out_TNH.device),
    )  # fmt: skip
