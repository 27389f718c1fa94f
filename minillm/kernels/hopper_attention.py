"""Flash Attention 3 (Shah et al. 2024, algorithms 1 and 2) over the paged cache, in Gluon, for Hopper GPUs alone.

The contract of `attention.paged_attention`, its slow twin, for half precision and head sizes 64 and 128; `gpu` knows
when it may be used. A program stays on its multiprocessor and takes one item after the other: a tile of a row's queries
for one key head, those that see most keys first. Its warps have four roles and meet at barriers in shared memory:

    plan    1 warp    | which row, which queries, how many key tiles | the next item ..
    load    1 warp    | queries | keys n-1 | keys n-2 | values n-1 | keys n-3 | values n-2 | ..      by the copy engine
    attend  4 warps   | qk n-1 | softmax | qk n-2 and values n-1 | softmax | qk n-3 and values n-2 | ..
    attend  4 warps   the same for the other half of the tile's 128 rows: query row // PADDED_GROUP, head row % ..

Key tiles go from the last to the first. One that a query does not see weighs nothing, so a query's sum depends on its
position alone; and, where a step has too few query tiles for the GPU, on their number: then a row's keys are cut into
segments, each an item (`hopper_results`). The two roles of one warp are in `hopper_supply`.

Shapes: T tokens, N query heads, K key/value heads, H head size, R rows, S seats, M blocks a seat can hold, B blocks,
P block size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Gluon functions have no types that Python knows)

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minillm.kernels.attention import LOG2_E, num_multiprocessors
from minillm.kernels.decode_attention import Parts, overlap_options
from minillm.kernels.hopper_layouts import shared_layout, sums_layout
from minillm.kernels.hopper_results import (
    MAX_SHARES,
    choose_shares,
    merge_kernel,
    rows_layout,
    store_out,
    store_part,
)
from minillm.kernels.hopper_ring import leave, make_ring, wait_filled
from minillm.kernels.hopper_supply import (
    DEPTH,
    FIRST_POSITION,
    FIRST_TOKEN,
    HALF_ROWS,
    KV_HEAD,
    NUM_FIELDS,
    NUM_KEYS,
    NUM_QUERIES,
    NUM_TILES,
    SEGMENT,
    TILE_KEYS,
    field,
    load_items,
    plan_items,
    receive,
    segment_size,
)

__all__ = ["hopper_attention"]

LOW = gl.constexpr(-1e30)
"""Where the running maximum starts. Finite: minus infinity less itself would be no number."""


@gluon.jit
def tile_of(ring, turn, HEAD_SIZE: gl.constexpr):
    """Keys or values [TILE_KEYS, HEAD_SIZE] of this turn."""
    return ring[0].index(turn % DEPTH).permute((0, 2, 1, 3)).reshape([TILE_KEYS, HEAD_SIZE])


@gluon.jit
def clear_tail(values, turn, num_valid, HEAD_SIZE: gl.constexpr):
    """Zero a tile of values from row `num_valid` on: stale slots may hold NaN, which a weight of zero would not remove.

    Both groups do it, with the same result.
    """
    layout: gl.constexpr = rows_layout(HEAD_SIZE)
    shape: gl.constexpr = [DEPTH * TILE_KEYS // 8, HEAD_SIZE // 64, 8, 64]
    lines = values[0]._reinterpret(values[0].dtype, shape, shared_layout(3))
    for line in range(num_valid // 8, TILE_KEYS // 8):
        is_valid = (line * 8 + gl.arange(0, 8, gl.SliceLayout(1, layout)) < num_valid)[:, None]
        part = lines.index(turn % DEPTH * (TILE_KEYS // 8) + line).permute((1, 0, 2)).reshape([8, HEAD_SIZE])
        part.store(gl.where(is_valid, part.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def weigh(scores, top, total, last_keys, scale_log2, MASKED: gl.constexpr):
    """Online softmax of one tile; a row sees keys 0 .. last_keys of it. Weights stay float32 until they are needed:
    carried from turn to turn as halves they would be unpacked and packed again.
    """
    if MASKED:
        keys = gl.arange(0, TILE_KEYS, gl.SliceLayout(0, sums_layout(TILE_KEYS)))
        scores = gl.where(last_keys[:, None] >= keys[None, :], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return weights, new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def attend_tile(
    q, keys, values, turn, has_next, weights, top, total, acc, last_keys, scale_log2,
    HEAD_SIZE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Score and weigh the keys of this turn; the values of the turn before are added meanwhile.

    The wait for the next keys ends the basic block between softmax and the wait for that addition: without it the
    assembler sinks the softmax below the wait, and nothing overlaps.
    """
    layout: gl.constexpr = sums_layout(TILE_KEYS)
    out_layout: gl.constexpr = sums_layout(HEAD_SIZE)
    rounded = gl.convert_layout(weights.to(keys[0].dtype), gl.DotOperandLayout(0, out_layout, 2))
    scores = gl.zeros([HALF_ROWS, TILE_KEYS], gl.float32, layout)
    k = tile_of(keys, turn, HEAD_SIZE)
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    wait_filled(values, turn - 1)
    acc = warpgroup_mma(rounded, tile_of(values, turn - 1, HEAD_SIZE), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    leave(keys, turn)
    weights, top, total, shrink = weigh(scores, top, total, last_keys, scale_log2, MASKED)
    wait_filled(keys, turn + 1, pred=has_next)
    acc, rounded = warpgroup_mma_wait(0, deps=[acc, rounded])
    leave(values, turn - 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
    return weights, top, total, acc


@gluon.jit
def attend_items(
    items, queries, keys, values, out_ptr, acc_ptr, top_ptr, total_ptr, scale_log2, shares,
    GROUP_INDEX: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED_GROUP: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Four warps: one half of the tile rows of all items. `scores` are always those of the next tile to be weighed."""
    dtype: gl.constexpr = keys[0].dtype
    layout: gl.constexpr = sums_layout(TILE_KEYS)
    out_layout: gl.constexpr = sums_layout(HEAD_SIZE)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    FIRST_QUERY: gl.constexpr = GROUP_INDEX * HALF_ROWS // PADDED_GROUP  # of this half
    queries_S = FIRST_QUERY + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, layout)) // PADDED_GROUP
    empty = gl.zeros([HALF_ROWS, TILE_KEYS], gl.float32, layout)
    q_turn = 0
    turn = 0  # of the tile that `scores` belong to
    fields = receive(items, q_turn, 4)
    num_tiles = field(fields, NUM_TILES, 4)
    scores = empty
    if num_tiles > 0:
        wait_filled(queries, q_turn)
        wait_filled(keys, turn)
        k = tile_of(keys, turn, HEAD_SIZE)
        scores = warpgroup_mma(queries[0].index(GROUP_INDEX), k.permute((1, 0)), empty, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        leave(keys, turn)
    while num_tiles > 0:
        first_token = field(fields, FIRST_TOKEN, 4)
        num_queries = field(fields, NUM_QUERIES, 4)
        first_position = field(fields, FIRST_POSITION, 4)
        num_keys = field(fields, NUM_KEYS, 4)
        kv_head = field(fields, KV_HEAD, 4)
        segment = field(fields, SEGMENT, 4)
        first_tile = gl.maximum(segment, 0) * segment_size(num_keys, shares)
        q = queries[0].index(q_turn % DEPTH * 2 + GROUP_INDEX)
        # Tiles that all queries of this half see all of.
        num_whole = (first_position + FIRST_QUERY + 1) // TILE_KEYS - first_tile
        first_key = (first_tile + num_tiles - 1) * TILE_KEYS
        last_keys = first_position + queries_S - first_key
        top = gl.full([HALF_ROWS], LOW, gl.float32, gl.SliceLayout(1, layout))
        total = gl.zeros([HALF_ROWS], gl.float32, gl.SliceLayout(1, layout))
        weights, top, total, _ = weigh(scores, top, total, last_keys, scale_log2, True)
        wait_filled(keys, turn + 1, pred=num_tiles > 1)
        if first_key + TILE_KEYS > num_keys:
            wait_filled(values, turn)
            clear_tail(values, turn, num_keys - first_key, HEAD_SIZE)
        acc = gl.zeros([HALF_ROWS, HEAD_SIZE], gl.float32, out_layout)
        num_masked = gl.minimum(gl.maximum(num_tiles - num_whole, 1), num_tiles)
        for index in range(1, num_masked):
            turn += 1
            last_keys += TILE_KEYS
            weights, top, total, acc = attend_tile(
                q, keys, values, turn, index + 1 < num_tiles, weights, top, total, acc, last_keys, scale_log2,
                HEAD_SIZE, True)  # fmt: skip
        for index in range(num_masked, num_tiles):
            turn += 1
            weights, top, total, acc = attend_tile(
                q, keys, values, turn, index + 1 < num_tiles, weights, top, total, acc, last_keys, scale_log2,
                HEAD_SIZE, False)  # fmt: skip
        leave(queries, q_turn)
        q_turn += 1
        fields = receive(items, q_turn, 4)
        num_tiles = field(fields, NUM_TILES, 4)
        # The next item's first scores, if there is one, beside this one's last values.
        wait_filled(queries, q_turn, pred=num_tiles > 0)
        wait_filled(keys, turn + 1, pred=num_tiles > 0)
        rounded = gl.convert_layout(weights.to(dtype), p_layout)
        k = tile_of(keys, turn + 1, HEAD_SIZE)
        next_q = queries[0].index(q_turn % DEPTH * 2 + GROUP_INDEX)
        scores = warpgroup_mma(next_q, k.permute((1, 0)), empty, use_acc=False, is_async=True)
        wait_filled(values, turn)
        acc = warpgroup_mma(rounded, tile_of(values, turn, HEAD_SIZE), acc, is_async=True)
        scores, acc, rounded = warpgroup_mma_wait(0, deps=[scores, acc, rounded])
        leave(keys, turn + 1)
        leave(values, turn)
        turn += 1
        first_head = first_token.to(gl.int64) * NUM_HEADS + kv_head * GROUP
        if segment < 0:
            acc = acc * gl.convert_layout(1 / total, gl.SliceLayout(1, out_layout))[:, None]
            store_out(
                out_ptr, acc, first_head, num_queries,
                FIRST_QUERY, NUM_HEADS, GROUP, PADDED_GROUP, HEAD_SIZE)  # fmt: skip
        else:
            store_part(
                acc_ptr, top_ptr, total_ptr, acc, top, total, segment, shares, first_head, num_queries,
                FIRST_QUERY, NUM_HEADS, GROUP, PADDED_GROUP, HEAD_SIZE)  # fmt: skip


# The integer tensors are slices of a packed buffer: their alignment changes from step to step and must not recompile.
@gluon.jit(
    do_not_specialize=[
        "rows_ptr", "query_starts_ptr", "context_lens_ptr", "next_ptr", "table_stride", "num_rows", "values_line",
        "shares",
    ]
)  # fmt: skip
def hopper_kernel(
    q_tokens, kv_lines, out_ptr, acc_ptr, top_ptr, total_ptr, num_parts_ptr, block_tables_ptr, rows_ptr,
    query_starts_ptr, context_lens_ptr, next_ptr, scale_log2, table_stride, num_rows, values_line, shares,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, PADDED_GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, MIN_QUERIES: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """Rows of at least MIN_QUERIES queries. `next_ptr` leads to a zero, also afterwards. Any number of programs.

    OVERLAPS: until `gdc_wait` only lengths and tables are read, and nothing is written.
    """
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    dtype: gl.constexpr = kv_lines.dtype
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles: gl.constexpr = [DEPTH, TILE_KEYS // 8, HEAD_SIZE // 64, 8, 64]
    items = make_ring(gl.allocate_shared_memory(gl.int32, [DEPTH, NUM_FIELDS], plain), DEPTH, 3)
    queries = make_ring(gl.allocate_shared_memory(dtype, [DEPTH * 2, HALF_ROWS, HEAD_SIZE], shared_layout(2)), DEPTH, 2)
    keys = make_ring(gl.allocate_shared_memory(dtype, tiles, shared_layout(4)), DEPTH, 2)
    values = make_ring(gl.allocate_shared_memory(dtype, tiles, shared_layout(4)), DEPTH, 2)
    gl.warp_specialize(
        [
            (attend_items, (items, queries, keys, values, out_ptr, acc_ptr, top_ptr, total_ptr, scale_log2, shares,
                            0, NUM_HEADS, GROUP, PADDED_GROUP, HEAD_SIZE)),
            (attend_items, (items, queries, keys, values, out_ptr, acc_ptr, top_ptr, total_ptr, scale_log2, shares,
                            1, NUM_HEADS, GROUP, PADDED_GROUP, HEAD_SIZE)),
            (load_items, (items, queries, keys, values, q_tokens, kv_lines, block_tables_ptr, table_stride, values_line,
                          shares, GROUP, PADDED_GROUP, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, OVERLAPS)),
            (plan_items, (items, rows_ptr, query_starts_ptr, context_lens_ptr, next_ptr, num_parts_ptr, num_rows,
                          shares, NUM_KV_HEADS, 2 * HALF_ROWS // PADDED_GROUP, MIN_QUERIES, OVERLAPS)),
        ],
        [4, 1, 1],
        [240, 24, 24],  # registers of a thread: what the attending groups need, the others leave
    )  # fmt: skip


def hopper_attention(
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
    counts_T1: Tensor | None = None,
) -> None:
    """Attention of rows with at least `min_queries` query tokens (1 or more) into their tokens of `out_TNH`.

    `counts_T1`: int32 [T + 1], zeros for the first layer of a step and then, as they are, for its other layers of the
    same shapes: parts of each token whose keys are cut, else 0; last the next item, 0 between launches. With it the
    kernel may start before the one before it ends, which may not be what wrote counts, lengths or tables.

    bfloat16 or float16, head size 64 or 128, blocks of 16 to 128 (a power of two), contiguous tensors. The grid is a
    bound from shapes: no sync, and a captured launch serves any lengths.
    """
    num_tokens, num_heads, head_size = q_TNH.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_2BKPH.shape
    num_rows = rows_R.shape[0]
    padded_group = triton.next_power_of_2(num_heads // num_kv_heads)
    q_tokens = TensorDescriptor.from_tensor(q_TNH, [64 // padded_group, padded_group, 64], shared_layout(3))
    lines = num_blocks * num_kv_heads * block_size // 8  # of keys alone
    kv_lines = TensorDescriptor(
        kv_2BKPH,
        shape=[2 * lines, head_size // 64, 8, 64],
        strides=[8 * head_size, 64, head_size, 1],
        block_shape=[block_size // 8, head_size // 64, 8, 64],
        layout=shared_layout(4),
    )
    num_programs = num_multiprocessors(q_TNH.device)
    num_tiles = triton.cdiv(num_tokens * padded_group, 128) * num_kv_heads
    shares = choose_shares(num_tiles, num_programs, block_tables_SM.shape[1] * block_size)
    num_shared = num_tokens if shares > 1 else 0
    parts = Parts.empty((num_shared, num_heads, shares, head_size), q_TNH.device)
    options = overlap_options(q_TNH.device)
    if counts_T1 is None:
        counts_T1, options = torch.zeros(num_tokens + 1, dtype=torch.int32, device=q_TNH.device), {"OVERLAPS": False}
    num_items = (num_tiles + num_rows * num_kv_heads) * shares
    hopper_kernel[(min(num_items, num_programs),)](
        q_tokens, kv_lines, out_TNH, *parts, counts_T1, block_tables_SM, rows_R, query_starts_R1, context_lens_R,
        counts_T1[num_tokens:], scale * LOG2_E, block_tables_SM.stride(0), num_rows, lines, shares,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, PADDED_GROUP=padded_group, HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size, MIN_QUERIES=min_queries, num_warps=4, **options,
    )  # fmt: skip
    if shares > 1:
        merge_kernel[(num_tokens, num_kv_heads)](
            *parts, counts_T1, out_TNH, shares,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, PADDED_GROUP=padded_group, HEAD_SIZE=head_size,
            MAX_SHARES=MAX_SHARES, num_warps=4,
        )  # fmt: skip
