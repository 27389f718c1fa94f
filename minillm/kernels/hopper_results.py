"""What the Hopper kernel leaves: half a tile of the output, or of a segment's partial results, which are merged.

Few queries behind a long context are too few tiles for the GPU. Their row's keys are cut into segments then:

    keys        0 ... 4096 ... 8192 ... 12288
    one item    |                           |     in registers, written to the output
    three       |   a    |   b    |   c     |     each written as sum of values, top score, sum of weights; then merged

Shapes are as in `hopper_attention`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (Triton and Gluon functions have no types that Python knows)

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from minillm.kernels.hopper_layouts import sums_layout
from minillm.kernels.hopper_supply import HALF_ROWS, MIN_SEGMENT, TILE_KEYS

__all__ = ["MAX_SHARES", "choose_shares", "merge_kernel", "rows_layout", "store_out", "store_part"]

MAX_SHARES = 16
"""Most segments of a row's keys."""
PART_COST = 0.03
"""Time that each more segment costs, partial results written and read, over that of whole rows."""


@triton.constexpr_function
def rows_layout(head_size):
    """[rows, head size] over four warps, 16 bytes to a thread."""
    return gl.BlockedLayout([1, 8], [256 // head_size, head_size // 8], [4, 1], [1, 0])


@gluon.jit
def heads_of(
    first_head, num_queries, FIRST_QUERY: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
    PADDED_GROUP: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of each row of half a tile the place among all tokens' heads, and whether it is one and not padding."""
    rows = gl.arange(0, HALF_ROWS, gl.SliceLayout(1, layout))
    query = FIRST_QUERY + rows // PADDED_GROUP
    member = rows % PADDED_GROUP
    return first_head + query * NUM_HEADS + member, (query < num_queries) & (member < GROUP)


@gluon.jit
def store_out(
    out_ptr, acc, first_head, num_queries,
    FIRST_QUERY: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED_GROUP: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Half a tile of the output."""
    layout: gl.constexpr = rows_layout(HEAD_SIZE)
    heads, is_real = heads_of(first_head, num_queries, FIRST_QUERY, NUM_HEADS, GROUP, PADDED_GROUP, layout)
    dims = gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, layout))
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), layout)
    gl.store(out_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], out, mask=is_real[:, None])


@gluon.jit
def store_part(
    acc_ptr, top_ptr, total_ptr, acc, top, total, segment, shares, first_head, num_queries,
    FIRST_QUERY: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, PADDED_GROUP: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Half a tile of one segment's partial results."""
    layout: gl.constexpr = sums_layout(TILE_KEYS)
    heads, is_real = heads_of(first_head, num_queries, FIRST_QUERY, NUM_HEADS, GROUP, PADDED_GROUP, layout)
    gl.store(top_ptr + heads * shares + segment, top, mask=is_real)
    gl.store(total_ptr + heads * shares + segment, total, mask=is_real)
    out_layout: gl.constexpr = sums_layout(HEAD_SIZE)
    rows, is_row = heads_of(first_head, num_queries, FIRST_QUERY, NUM_HEADS, GROUP, PADDED_GROUP, out_layout)
    dims = gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, out_layout))
    gl.store(acc_ptr + (rows * shares + segment)[:, None] * HEAD_SIZE + dims[None, :], acc, mask=is_row[:, None])


@triton.jit(do_not_specialize=["shares"])
def merge_kernel(
    acc_ptr, top_ptr, total_ptr, num_parts_ptr, out_ptr, shares,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PADDED_GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    MAX_SHARES: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, key heads): the sum of the segments of a token whose row's keys were cut."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    token = tl.program_id(0)
    num_parts = tl.load(num_parts_ptr + token)
    if num_parts == 0:
        return
    segments = tl.arange(0, MAX_SHARES)
    group = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, HEAD_SIZE)
    heads = token.to(tl.int64) * NUM_HEADS + tl.program_id(1) * GROUP + group
    is_head = group < GROUP
    is_part = (segments < num_parts)[:, None] & is_head[None, :]
    places = heads[None, :] * shares + segments[:, None]
    tops = tl.load(top_ptr + places, mask=is_part, other=float("-inf"))
    totals = tl.load(total_ptr + places, mask=is_part, other=0.0)
    top = tl.max(tops, 0)
    factors = tl.where(is_part, tl.exp2(tops - top[None, :]), 0.0)
    total = tl.sum(totals * factors, 0)
    acc = tl.zeros([PADDED_GROUP, HEAD_SIZE], tl.float32)
    for segment in tl.static_range(MAX_SHARES):  # all are asked for before the first is used
        mask = (is_head & (segment < num_parts))[:, None]
        ptrs = acc_ptr + (heads * shares + segment)[:, None] * HEAD_SIZE + dims[None, :]
        factor = tl.sum(tl.where((segments == segment)[:, None], factors, 0.0), 0)
        acc += tl.load(ptrs, mask=mask, other=0.0) * factor[:, None]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + heads[:, None] * HEAD_SIZE + dims[None, :], out, mask=is_head[:, None])


def choose_shares(num_tiles: int, num_programs: int, max_keys: int) -> int:
    """Most segments of a row's keys, of which there are at most `max_keys`.

    By the rounds that `num_tiles` query tiles of all key heads take on the GPU's multiprocessors, `num_programs`; more
    than two are full enough.
    """
    if num_tiles >= 2 * num_programs:
        return 1

    def rounds(shares: int) -> float:
        return -(-num_tiles * shares // num_programs) / shares * (1 + PART_COST * shares)

    most = min(MAX_SHARES, triton.cdiv(max_keys, MIN_SEGMENT.value * TILE_KEYS.value))
    return min(range(1, most + 1), key=rounds)
