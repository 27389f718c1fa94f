"""Attention of rows with one query token: split-KV decoding (Dao et al. 2023, "Flash-Decoding") over the paged cache.

A row's keys are cut into segments whose size follows from the row's own length, so the order of its sums depends on
nothing else: not on its neighbours, the batch, the bound on lengths or the number of programs. The programs stay
resident and share out the work list (row, segment, key head), which each derives from the lengths by itself:

    lengths          600  100  300         work list   0 1 2 | 3 | 4 5     times key heads, program p takes p, p + g, ..
    segments (256)    3    1    2          one segment: the output itself; more: partial results, merged in order

It knows no requests. The small side (query heads of a group) is the N of each product, the keys are its M.

Shapes: T tokens, N query heads, K key/value heads, H head size, R rows, S seats, M blocks a seat can hold, B blocks,
P block size, G most segments of a row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions have no types that Python knows)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.attention import LOG2_E, read_pages, read_tile

__all__ = ["MIN_SEGMENT", "decode_attention", "max_segments"]

MIN_SEGMENT = 256
"""Keys of a segment, if the row needs no larger ones. Smaller: more programs for few rows, more to merge for many."""


@triton.jit
def segment_size(num_keys, MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Keys per segment of a row: whole tiles, at least MIN_SEGMENT, at most MAX_SEGMENTS segments."""
    return tl.maximum(MIN_SEGMENT, tl.cdiv(tl.cdiv(num_keys, MAX_SEGMENTS), TILE_KEYS) * TILE_KEYS)


@triton.jit(do_not_specialize=["rows_ptr", "context_lens_ptr", "table_stride", "num_rows"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, block_tables_ptr, rows_ptr, context_lens_ptr,
    scale_log2, table_stride, num_rows,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    PADDED_GROUP: tl.constexpr, PADDED_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row r is token r. Writes the output of rows of one segment, and acc, top, total [R, N, G ...] of the others."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    all_rows = tl.arange(0, PADDED_ROWS)
    lens = tl.load(context_lens_ptr + all_rows, mask=all_rows < num_rows, other=0)
    counts = tl.cdiv(lens, segment_size(lens, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS))
    ends = tl.cumsum(counts, 0)

    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, PADDED_HEAD)
    for item in tl.range(tl.program_id(0), tl.sum(counts, 0) * NUM_KV_HEADS, tl.num_programs(0), num_stages=1):
        kv_head = item % NUM_KV_HEADS
        is_before = ends <= item // NUM_KV_HEADS
        row = tl.sum(is_before.to(tl.int32), 0)
        segment = item // NUM_KV_HEADS - tl.sum(tl.where(is_before, counts, 0), 0)
        num_keys = tl.load(context_lens_ptr + row)
        size = segment_size(num_keys, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)
        begin = segment * size
        end = tl.minimum(begin + size, num_keys)
        table_ptr = block_tables_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride

        heads = row.to(tl.int64) * NUM_HEADS + kv_head * GROUP + group
        mask = (group < GROUP)[:, None] & (dims < HEAD_SIZE)[None, :]
        q = tl.load(q_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
        q = tl.trans(q)
        head_offset = kv_head * (BLOCK_SIZE * HEAD_SIZE)
        top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_GROUP], tl.float32)
        acc = tl.zeros([PADDED_HEAD, PADDED_GROUP], tl.float32)
        pages = read_pages(table_ptr, begin, end, BLOCK_SIZE, TILE_KEYS)
        for key_start in tl.range(begin, end, TILE_KEYS, num_stages=STAGES):
            k = read_tile(k_ptr + head_offset, pages, key_start, end,
                          BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
            v = read_tile(v_ptr + head_offset, pages, key_start, end,
                          BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
            pages = read_pages(table_ptr, key_start + TILE_KEYS, end, BLOCK_SIZE, TILE_KEYS)
            scores = tl.dot(k, q, input_precision="ieee") * scale_log2
            scores = tl.where((key_start + tl.arange(0, TILE_KEYS) < end)[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            weights = tl.exp2(scores - new_top[None, :])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, 0)
            acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc * shrink[None, :], input_precision="ieee")
            top = new_top
        acc = tl.trans(acc)
        if size >= num_keys:
            out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], out, mask=mask)
        else:
            parts = heads * MAX_SEGMENTS + segment
            tl.store(acc_ptr + parts[:, None] * HEAD_SIZE + dims[None, :], acc, mask=mask)
            tl.store(top_ptr + parts, top, mask=group < GROUP)
            tl.store(total_ptr + parts, total, mask=group < GROUP)


@triton.jit(do_not_specialize=["context_lens_ptr"])
def merge_kernel(
    acc_ptr, top_ptr, total_ptr, out_ptr, context_lens_ptr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr, TILE_KEYS: tl.constexpr,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, heads): the softmax over all keys from those of the segments; a row of one segment has its output."""
    row = tl.program_id(0)
    num_keys = tl.load(context_lens_ptr + row)
    size = segment_size(num_keys, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)
    if size < num_keys:
        head = row.to(tl.int64) * NUM_HEADS + tl.program_id(1)
        segments = tl.arange(0, MAX_SEGMENTS)
        dims = tl.arange(0, PADDED_HEAD)
        is_used = segments * size < num_keys
        parts = head * MAX_SEGMENTS + segments
        top = tl.load(top_ptr + parts, mask=is_used, other=float("-inf"))
        total = tl.load(total_ptr + parts, mask=is_used, other=0.0)
        mask = is_used[:, None] & (dims < HEAD_SIZE)[None, :]
        acc = tl.load(acc_ptr + parts[:, None] * HEAD_SIZE + dims[None, :], mask=mask, other=0.0)
        shrink = tl.exp2(top - tl.max(top, 0))
        out = tl.sum(acc * shrink[:, None], 0) / tl.sum(total * shrink, 0)
        tl.store(out_ptr + head * HEAD_SIZE + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_SIZE)


def max_segments(num_kv_heads: int) -> int:
    """Most segments of a row: a power of two such that one long row alone gives every multiprocessor a program."""
    return min(128, max(16, int(triton.next_power_of_2(triton.cdiv(128, num_kv_heads)))))


@cache
def num_resident(device: torch.device, programs_per_multiprocessor: int) -> int:
    """Programs that run at once on the device; under the interpreter a few, which take several items each."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * programs_per_multiprocessor


def decode_attention(
    q_TNH: Tensor,
    out_TNH: Tensor,
    *,
    kv_2BKPH: Tensor,
    block_tables_SM: Tensor,
    rows_R: Tensor,
    context_lens_R: Tensor,
    scale: float,
    num_decodes: int,
    max_context_len: int,
    min_segment: int = MIN_SEGMENT,
) -> None:
    """Attention of rows 0 .. num_decodes - 1, each owning the token of its number, into `out_TNH`.

    `max_context_len` bounds those rows' contexts: it sizes the grid and says whether there is anything to merge.
    """
    _, num_heads, head_size = q_TNH.shape
    _, _, num_kv_heads, block_size, _ = kv_2BKPH.shape
    padded_head = max(16, triton.next_power_of_2(head_size))
    is_half = q_TNH.element_size() == 2
    tile_keys = max(16, min(128, (8192 if is_half else 2048) // padded_head))
    most = max_segments(num_kv_heads)
    is_split = max_context_len > min_segment
    shape = (num_decodes, num_heads, most) if is_split else (0,)
    acc = torch.empty((*shape, head_size), dtype=torch.float32, device=q_TNH.device)
    top, total = (torch.empty(shape, dtype=torch.float32, device=q_TNH.device) for _ in range(2))
    num_items = num_decodes * num_kv_heads * min(most, triton.cdiv(max_context_len, min_segment))
    decode_kernel[(min(num_items, num_resident(q_TNH.device, 2)),)](
        q_TNH, kv_2BKPH[0], kv_2BKPH[1], out_TNH, acc, top, total, block_tables_SM, rows_R, context_lens_R,
        scale * LOG2_E, block_tables_SM.stride(0), num_decodes,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, PADDED_HEAD=padded_head,
        PADDED_GROUP=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        PADDED_ROWS=max(16, triton.next_power_of_2(num_decodes)), BLOCK_SIZE=block_size, TILE_KEYS=tile_keys,
        MIN_SEGMENT=min_segment, MAX_SEGMENTS=most, STAGES=3 if is_half else 2, num_warps=4 if is_half else 8,
    )  # fmt: skip
    if is_split:
        merge_kernel[(num_decodes, num_heads)](
            acc, top, total, out_TNH, context_lens_R,
            NUM_HEADS=num_heads, HEAD_SIZE=head_size, PADDED_HEAD=padded_head, TILE_KEYS=tile_keys,
            MIN_SEGMENT=min_segment, MAX_SEGMENTS=most, num_warps=4,
        )  # fmt: skip
