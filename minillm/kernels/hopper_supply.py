"""What the Hopper kernel works on, on its way into shared memory: items are planned, queries, keys and values copied.

It knows nothing of what is computed from a tile; rings are `hopper_ring`'s, shapes as in `hopper_attention`.

    plan    find the next item, send its fields                            items
    load    receive them, copy its queries, then its tiles page by page    queries, keys, values

A line is eight slots of one head, [H / 64, 8, 64] in shared memory: so a page is one copy of the copy engine (TMA) and
a tile still has even strides, as the tensor cores want it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (Gluon functions have no types that Python knows)

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from minillm.kernels.hopper_layouts import shared_layout
from minillm.kernels.hopper_ring import leave, wait_filled, wait_left

TILE_KEYS = gl.constexpr(128)
HALF_ROWS = gl.constexpr(64)
"""Tile rows of one attending group: what one instruction of a group of four warps multiplies."""
DEPTH = gl.constexpr(2)
"""Items, queries, key tiles and value tiles that are in use or on their way."""
MIN_SEGMENT = gl.constexpr(16)
"""Key tiles of a segment, if the row's keys are cut: its partial results cost what about three tiles do."""

NUM_TILES = gl.constexpr(0)  # What an item says, by position; one of no key tiles is the end.
FIRST_TOKEN = gl.constexpr(1)
NUM_QUERIES = gl.constexpr(2)  # of the row, from the item's first on
FIRST_POSITION = gl.constexpr(3)
NUM_KEYS = gl.constexpr(4)  # of the row
KV_HEAD = gl.constexpr(5)
SEAT = gl.constexpr(6)
SEGMENT = gl.constexpr(7)  # -1: the row's keys are not cut
NUM_FIELDS = gl.constexpr(8)


@triton.constexpr_function
def fields_layout(num_warps):
    """Each thread has all fields of an item."""
    return gl.BlockedLayout([8], [32], [num_warps], [0])


@gluon.jit
def receive(items, turn, NUM_WARPS: gl.constexpr):
    """The fields of the next item."""
    wait_filled(items, turn)
    fields = items[0].index(turn % DEPTH).load(fields_layout(NUM_WARPS))
    leave(items, turn)
    return fields


@gluon.jit
def field(fields, position, NUM_WARPS: gl.constexpr):
    """One field as a scalar: nothing leaves the thread."""
    return gl.sum(gl.where(gl.arange(0, NUM_FIELDS, fields_layout(NUM_WARPS)) == position, fields, 0), 0)


@gluon.jit
def segment_size(num_keys, shares):
    """Key tiles of a segment of a row, of which there are at most `shares`."""
    return gl.maximum(gl.cdiv(gl.cdiv(num_keys, TILE_KEYS), shares), MIN_SEGMENT)


@gluon.jit
def num_segments(num_keys, shares):
    """Segments of a row with keys."""
    return gl.cdiv(gl.cdiv(num_keys, TILE_KEYS), segment_size(num_keys, shares))


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def find_item(
    index, query_starts_ptr, context_lens_ptr, num_rows, shares, TILE_QUERIES: gl.constexpr, MIN_QUERIES: gl.constexpr
):
    """The row (num_rows: none) that has item `index` of one key head, which of its items that is, and items in all.

    Counted 128 rows at a time: a search would wait for one load after the other.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    row = 0
    num_before = 0  # items of the rows before `row`
    num_seen = 0
    for chunk in range(0, num_rows, 128):
        rows = chunk + gl.arange(0, 128, layout)
        is_row = rows < num_rows
        starts = gl.load(query_starts_ptr + rows, mask=is_row, other=0)
        counts = gl.load(query_starts_ptr + rows + 1, mask=is_row, other=0) - starts
        num_keys = gl.load(context_lens_ptr + rows, mask=is_row, other=0)
        tiles = gl.where(counts >= MIN_QUERIES, (counts + TILE_QUERIES - 1) // TILE_QUERIES, 0)
        num_items = tiles * num_segments(num_keys, shares)
        ends = num_seen + gl.associative_scan(num_items, 0, add)
        is_before = (ends <= index) & is_row
        row += gl.sum(is_before.to(gl.int32), 0)
        num_before = gl.maximum(num_before, gl.max(gl.where(is_before, ends, 0), 0))
        num_seen += gl.sum(num_items, 0)
    return row, index - num_before, num_seen


@gluon.jit
def plan_items(
    items, rows_ptr, query_starts_ptr, context_lens_ptr, next_ptr, num_parts_ptr, num_rows, shares,
    NUM_KV_HEADS: gl.constexpr, TILE_QUERIES: gl.constexpr, MIN_QUERIES: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """One warp: draw items, of all programs' one list, until there are none; the last one sent has no key tiles.

    A program draws once for each item that it sends, so the last draw of all is known, and leaves a zero again.
    """
    layout: gl.constexpr = fields_layout(1)
    position = gl.arange(0, NUM_FIELDS, layout)
    turn = 0
    item = gl.program_id(0)
    num_tiles = 1
    while num_tiles > 0:
        row, index, num_items = find_item(
            item // NUM_KV_HEADS, query_starts_ptr, context_lens_ptr, num_rows, shares,
            TILE_QUERIES, MIN_QUERIES)  # fmt: skip
        is_item = row < num_rows
        row_start = gl.load(query_starts_ptr + row, mask=is_item, other=0)
        num_queries = gl.load(query_starts_ptr + row + 1, mask=is_item, other=0) - row_start
        num_keys = gl.load(context_lens_ptr + row, mask=is_item, other=1)
        parts = num_segments(num_keys, shares)
        size = segment_size(num_keys, shares)
        # One segment of all query tiles after the other, so that programs side by side read the same keys.
        num_row_tiles = gl.maximum(gl.cdiv(num_queries, TILE_QUERIES), 1)
        segment = index // num_row_tiles
        first_query = (num_row_tiles - 1 - index % num_row_tiles) * TILE_QUERIES
        first_position = num_keys - num_queries + first_query
        num_seen = gl.cdiv(gl.minimum(first_position + TILE_QUERIES, num_keys), TILE_KEYS)
        num_tiles = gl.minimum(num_seen - segment * size, size)
        # A segment behind what the queries see is one tile that weighs nothing.
        num_tiles = gl.where(is_item, gl.maximum(num_tiles, 1), 0)
        if OVERLAPS:  # the layer before may still draw
            gdc_wait()
        if (parts > 1) & is_item:
            tokens = gl.arange(0, TILE_QUERIES, gl.BlockedLayout([1], [32], [1], [0]))
            places = num_parts_ptr + row_start + first_query + tokens
            gl.store(places, parts, mask=tokens < num_queries - first_query)
        fields = gl.full([NUM_FIELDS], 0, gl.int32, layout)
        fields = gl.where(position == NUM_TILES, num_tiles, fields)
        fields = gl.where(position == FIRST_TOKEN, row_start + first_query, fields)
        fields = gl.where(position == NUM_QUERIES, num_queries - first_query, fields)
        fields = gl.where(position == FIRST_POSITION, first_position, fields)
        fields = gl.where(position == NUM_KEYS, num_keys, fields)
        fields = gl.where(position == KV_HEAD, item % NUM_KV_HEADS, fields)
        fields = gl.where(position == SEGMENT, gl.where(parts > 1, segment, -1), fields)
        fields = gl.where(position == SEAT, gl.load(rows_ptr + row, mask=is_item, other=0), fields)
        wait_left(items, turn)
        items[0].index(turn % DEPTH).store(fields)
        gl.thread_barrier()
        mbarrier.arrive(items[1].index(turn % DEPTH), count=1)
        drawn = gl.atomic_add(next_ptr, 1)
        item = gl.num_programs(0) + drawn
        if drawn == num_items * NUM_KV_HEADS + gl.num_programs(0) - 1:
            gl.store(next_ptr, 0)
        turn += 1


@gluon.jit
def load_tile(kv_lines, ring, turn, lines, HEAD_SIZE: gl.constexpr, NUM_LINES: gl.constexpr):
    """Copy a tile of keys or values that begins, NUM_LINES at a time, at `lines`; outside the cache all is zero."""
    NUM_COPIES: gl.constexpr = TILE_KEYS // (8 * NUM_LINES)
    shape: gl.constexpr = [DEPTH * NUM_COPIES, NUM_LINES, HEAD_SIZE // 64, 8, 64]
    parts = ring[0]._reinterpret(kv_lines.dtype, shape, shared_layout(4))
    wait_left(ring, turn)
    filled = ring[1].index(turn % DEPTH)
    mbarrier.expect(filled, TILE_KEYS * HEAD_SIZE * 2)
    for copy in gl.static_range(NUM_COPIES):
        part = parts.index(turn % DEPTH * NUM_COPIES + copy)
        tma.async_copy_global_to_shared(kv_lines, [lines[copy], 0, 0, 0], filled, part)


@gluon.jit
def load_items(
    items, queries, keys, values, q_tokens, kv_lines, block_tables_ptr, table_stride, values_line, shares,
    GROUP: gl.constexpr, PADDED_GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_SIZE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """One warp: copy queries, and key tiles one ahead of the value tiles, which are needed later and left later."""
    HALVES: gl.constexpr = HEAD_SIZE // 64
    NUM_LINES: gl.constexpr = min(BLOCK_SIZE, TILE_KEYS) // 8
    HALF_QUERIES: gl.constexpr = HALF_ROWS // PADDED_GROUP
    OUTSIDE: gl.constexpr = -NUM_LINES
    NUM_COPIES: gl.constexpr = TILE_KEYS // (8 * NUM_LINES)
    shape: gl.constexpr = [DEPTH * 2 * HALVES, HALF_QUERIES, PADDED_GROUP, 64]
    q_parts = queries[0]._reinterpret(kv_lines.dtype, shape, shared_layout(3))
    turn = 0  # of keys and values
    q_turn = 0
    v_lines = ()
    for _ in gl.static_range(NUM_COPIES):
        v_lines = v_lines + (gl.to_tensor(OUTSIDE),)
    fields = receive(items, q_turn, 1)
    num_tiles = field(fields, NUM_TILES, 1)
    while num_tiles > 0:
        first_token = field(fields, FIRST_TOKEN, 1)
        num_keys = field(fields, NUM_KEYS, 1)
        kv_head = field(fields, KV_HEAD, 1)
        first_tile = gl.maximum(field(fields, SEGMENT, 1), 0) * segment_size(num_keys, shares)
        table_ptr = block_tables_ptr + field(fields, SEAT, 1).to(gl.int64) * table_stride
        wait_left(queries, q_turn)
        filled = queries[1].index(q_turn % DEPTH)
        mbarrier.expect(filled, 2 * HALF_ROWS * HEAD_SIZE * 2)
        if OVERLAPS:
            gdc_wait()
        for group in gl.static_range(2):
            for half in gl.static_range(HALVES):
                part = q_parts.index((q_turn % DEPTH * 2 + group) * HALVES + half)
                corner = [first_token + group * HALF_QUERIES, kv_head * GROUP, half * 64]
                tma.async_copy_global_to_shared(q_tokens, corner, filled, part)
        for index in range(num_tiles):
            first_key = (first_tile + num_tiles - 1 - index) * TILE_KEYS
            k_lines = ()
            for copy in gl.static_range(NUM_COPIES):
                key = first_key + copy * NUM_LINES * 8
                block = gl.load(table_ptr + key // BLOCK_SIZE, mask=key < num_keys, other=-1)
                line = (block * NUM_KV_HEADS + kv_head) * (BLOCK_SIZE // 8) + key % BLOCK_SIZE // 8
                k_lines = k_lines + (gl.where(block < 0, OUTSIDE, line),)
            load_tile(kv_lines, keys, turn, k_lines, HEAD_SIZE, NUM_LINES)
            if turn > 0:
                load_tile(kv_lines, values, turn - 1, v_lines, HEAD_SIZE, NUM_LINES)
            v_lines = ()
            for copy in gl.static_range(NUM_COPIES):
                v_lines = v_lines + (gl.where(k_lines[copy] < 0, OUTSIDE, values_line + k_lines[copy]),)
            turn += 1
        q_turn += 1
        fields = receive(items, q_turn, 1)
        num_tiles = field(fields, NUM_TILES, 1)
    if turn > 0:
        load_tile(kv_lines, values, turn - 1, v_lines, HEAD_SIZE, NUM_LINES)
