"""How the keys of rows with one query token are dealt to programs, found out once for all layers of a step.

A row's keys are cut into segments whose size follows from the row's own length, and a row is the sum of its segments
in their order: it depends on nothing else. How many programs share a row is a matter of speed alone. Where rows are too
few to keep a GPU busy however their lengths differ, or their number is not known at launch, a row longer than an even
share of all keys is cut. The device does so, as a graph knows no lengths.

    lengths          3000, 200, 700: an even share of four is 975 keys, of row 0 six segments of 192
    items            | row 0, keys 0 .. 1151 | row 0, 1152 .. 2303 | row 0, 2304 .. 2999 | row 1 | row 2 | none ..
    cut rows         | 0 |

Rows that are left whole come longest first. It knows no requests.

Shapes: R rows, S seats, B blocks, K key/value heads, P block size, H head size, I items, C cut rows.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions have no types that Python knows)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.attention import num_multiprocessors

__all__ = ["NUM_COLUMNS", "Deal", "choose_shares", "deal", "max_segments", "segment_constants", "segment_size"]

MIN_SEGMENT = 128
"""Keys of a segment, if the row needs no larger ones. Smaller: more programs for one short row, more to merge."""
MAX_SORTED_ROWS = 512
"""Most rows that are put in order by length, each compared with all; 256 of very different ones gain 2 to 4 %."""
DEALT_PROGRAMS = 3
"""Programs for each multiprocessor, if each row and key head had one, below which keys are dealt. Of more the longest
row is small beside the batch, and a merge costs more than it saves."""
MAX_FEW_ROWS = 8
"""Most rows of which two programs for each multiprocessor are enough."""
NUM_COLUMNS = tl.constexpr(6)
"""Of an item: row, seat, place among the cut rows or -1, first key, end of its keys (0: no item), keys of a segment."""


class Deal(NamedTuple):
    """Who does what."""

    items_I6: Tensor
    """int32, see NUM_COLUMNS."""
    cut_rows_C: Tensor
    """int32: rows of several items, then -1. At most as many as there are shares, none if rows are left whole."""
    num_programs: int
    """Programs for each key head that are enough: an item each, but where many short rows lie beside few long ones."""


@triton.jit
def segment_size(num_keys, MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Keys per segment of a row: whole tiles, at least MIN_SEGMENT, at most MAX_SEGMENTS segments."""
    return tl.maximum(MIN_SEGMENT, tl.cdiv(tl.cdiv(num_keys, MAX_SEGMENTS), TILE_KEYS) * TILE_KEYS)


@triton.jit(do_not_specialize=[
    "rows_ptr", "query_starts_ptr", "context_lens_ptr", "num_rows", "num_shares", "max_items", "num_cut",
])  # fmt: skip
def deal_kernel(
    items_ptr, cut_rows_ptr, rows_ptr, query_starts_ptr, context_lens_ptr, num_rows, num_shares, max_items, num_cut,
    MIN_SEGMENT: tl.constexpr, MAX_SEGMENTS: tl.constexpr, TILE_KEYS: tl.constexpr,
    PADDED_ROWS: tl.constexpr, IS_DEALT: tl.constexpr, IS_SORTED: tl.constexpr,
):  # fmt: skip
    """One program. An item takes as many segments as make up an even share of the batch's keys, so there are at most
    num_rows + num_shares; without IS_DEALT all of its row's."""
    rows = tl.arange(0, PADDED_ROWS)
    is_row = rows < num_rows
    starts = tl.load(query_starts_ptr + rows, mask=is_row, other=0)
    is_decode = tl.load(query_starts_ptr + rows + 1, mask=is_row, other=0) - starts == 1
    lens = tl.load(context_lens_ptr + rows, mask=is_decode, other=0)
    seats = tl.load(rows_ptr + rows, mask=is_decode, other=0)
    sizes = segment_size(lens, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)
    num_own = tl.full([PADDED_ROWS], MAX_SEGMENTS, tl.int32)
    if IS_DEALT:
        num_own = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(lens, 0), num_shares), 1), sizes)
    num_items = tl.cdiv(tl.cdiv(lens, sizes), num_own)
    firsts = tl.cumsum(num_items, 0) - num_items
    cut = tl.full([PADDED_ROWS], -1, tl.int32)
    if IS_DEALT:
        is_cut = num_items > 1
        cut = tl.where(is_cut, tl.cumsum(is_cut.to(tl.int32), 0) - 1, -1)
        tl.store(cut_rows_ptr + cut, rows, mask=is_cut)
        behind = tl.sum(is_cut.to(tl.int32), 0) + rows
        tl.store(cut_rows_ptr + behind, tl.full([PADDED_ROWS], -1, tl.int32), mask=behind < num_cut)
    if IS_SORTED:
        firsts = tl.zeros([PADDED_ROWS], tl.int32)  # rows that come before: longer ones, and of equals the first
        for chunk in tl.range(0, num_rows, 32, num_stages=1):
            others = chunk + tl.arange(0, 32)
            is_other = others < num_rows
            other_starts = tl.load(query_starts_ptr + others, mask=is_other, other=0)
            is_other = tl.load(query_starts_ptr + others + 1, mask=is_other, other=0) - other_starts == 1
            other_lens = tl.load(context_lens_ptr + others, mask=is_other, other=0)
            is_before = (other_lens[None, :] > lens[:, None]) | (
                (other_lens[None, :] == lens[:, None]) & (others[None, :] < rows[:, None])
            )
            firsts += tl.sum((is_before & is_other[None, :]).to(tl.int32), 1)
    for index in tl.range(0, tl.max(num_items, 0), num_stages=1):
        is_item = index < num_items
        item_ptr = items_ptr + (firsts + index) * NUM_COLUMNS
        first_key = index * num_own * sizes
        tl.store(item_ptr, rows, mask=is_item)
        tl.store(item_ptr + 1, seats, mask=is_item)
        tl.store(item_ptr + 2, cut, mask=is_item)
        tl.store(item_ptr + 3, first_key, mask=is_item)
        tl.store(item_ptr + 4, tl.minimum(first_key + num_own * sizes, lens), mask=is_item)
        tl.store(item_ptr + 5, sizes, mask=is_item)
    for first in tl.range(tl.sum(num_items, 0), max_items, PADDED_ROWS, num_stages=1):
        item_ptr = items_ptr + (first + rows) * NUM_COLUMNS
        is_none = first + rows < max_items
        tl.store(item_ptr + 3, tl.zeros([PADDED_ROWS], tl.int32), mask=is_none)
        tl.store(item_ptr + 4, tl.zeros([PADDED_ROWS], tl.int32), mask=is_none)


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


def segment_constants(num_kv_heads: int, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """What all that share a row must agree on."""
    padded_head = max(16, triton.next_power_of_2(head_size))
    return {
        "TILE_KEYS": max(16, min(128, (8192 if dtype.itemsize == 2 else 2048) // padded_head)),
        "MIN_SEGMENT": MIN_SEGMENT, "MAX_SEGMENTS": max_segments(num_kv_heads),
    }  # fmt: skip


def deal(
    kv_2BKPH: Tensor,
    *,
    rows_R: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    num_tokens: int,
    num_decodes: int,
    shares: int | None = None,
) -> Deal:
    """Deal the keys of those of the first `num_decodes` rows that have one query token.

    `shares`, among which each key head's keys are dealt (1: rows are left whole; None: chosen from the number of rows),
    changes no bit of the result.
    """
    _, _, num_kv_heads, _, head_size = kv_2BKPH.shape
    if shares is None:
        shares = choose_shares(num_tokens, num_decodes, num_kv_heads, num_multiprocessors(kv_2BKPH.device))
    is_dealt = shares > 1
    most = num_decodes + shares if is_dealt else num_decodes
    num_cut = min(num_decodes, shares) if is_dealt else 0
    items_I6, cut_rows_C = (
        torch.empty(shape, dtype=torch.int32, device=kv_2BKPH.device) for shape in ((most, 6), (num_cut,))
    )
    deal_kernel[(1,)](
        items_I6, cut_rows_C, rows_R, query_starts_R1, context_lens_R, num_decodes, shares, most, num_cut,
        **segment_constants(num_kv_heads, head_size, kv_2BKPH.dtype),
        PADDED_ROWS=max(16, triton.next_power_of_2(num_decodes)), IS_DEALT=is_dealt,
        IS_SORTED=not is_dealt and num_decodes <= MAX_SORTED_ROWS, num_warps=8,
    )  # fmt: skip
    return Deal(items_I6, cut_rows_C, min(most, 2 * shares) if is_dealt else most)
