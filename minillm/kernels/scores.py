"""Logprobs of tokens in Triton, with the likeliest tokens beside them: two launches for any number of rows.

They give what `scores_reference.score_tokens` gives, and of equal logits the lower token first. How many likeliest are
asked for is no part of a kernel's form: none is compiled for it.

    part    (row, 1,024 tokens): their top and sum of exponentials, how many beat the row's own token, and the likeliest
    merge   (row): all parts' sums, and the likeliest of the parts' likeliest, which are in order already

Shapes: L rows of logits, V vocabulary, M scored tokens, P parts of a row, k likeliest tokens, X = 2 + 2 k words.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.sampling import order_key

__all__ = ["score_tokens"]

PART = 1024  # a warp's: to find the largest of them takes no memory that warps share
LOWEST = tl.constexpr(-(2**63))  # below every key
LAST = tl.constexpr(2**31 - 1)


def score_tokens(logits_LV: Tensor, tokens_L: Tensor, rows_M: Tensor, num_top: int) -> Tensor:
    """Words of tokens and the `num_top` likeliest ones -> words_MX (int32); see `scores_reference.score_tokens`.

    Logits of any float dtype, contiguous in the vocabulary; tokens and rows int32.
    """
    num_scored, vocab_size = len(rows_M), logits_LV.shape[1]
    num_top, num_parts = min(num_top, vocab_size), triton.cdiv(vocab_size, PART)
    make = partial(torch.empty, device=logits_LV.device)
    words_MX = make(num_scored, 2 + 2 * num_top, dtype=torch.int32)
    if num_scored == 0:
        return words_MX
    sums_MP3 = make(num_scored, num_parts, 3, dtype=torch.float32)
    keys_MPk = make(num_scored, num_parts, num_top, dtype=torch.int64)
    rows = (logits_LV, logits_LV.stride(0), tokens_L, rows_M, sums_MP3, keys_MPk)
    part_kernel[(num_parts, num_scored)](*rows, vocab_size, num_parts, num_top, PART=PART, num_warps=1)
    merge_kernel[(num_scored,)](
        *(*rows, words_MX, num_parts, num_top), PARTS=triton.next_power_of_2(num_parts), num_warps=1
    )
    return words_MX


@triton.jit
def row_and_token(tokens_ptr, rows_ptr, scored):
    """A scored token's row of logits, and the token itself; in place of one that is NOT_FINITE any other."""
    row = tl.load(rows_ptr + scored).to(tl.int64)
    return row, tl.maximum(tl.load(tokens_ptr + row), 0)


# Tokens and rows lie within a step's packed words: how they are aligned must not recompile, nor what a request asks.
@triton.jit(do_not_specialize=["tokens_ptr", "rows_ptr", "num_top"])
def part_kernel(
    logits_ptr, stride_row, tokens_ptr, rows_ptr, sums_ptr, keys_ptr, vocab_size, num_parts, num_top,
    PART: tl.constexpr,
):  # fmt: skip
    """A part of a row. A token's key sorts as its logit does: the logit's bits, in order, then the id's, flipped."""
    part, scored = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, own_token = row_and_token(tokens_ptr, rows_ptr, scored)
    ids = part * PART + tl.arange(0, PART)
    is_token = ids < vocab_size
    row_ptr = logits_ptr + row * stride_row
    logits = tl.load(row_ptr + ids, mask=is_token, other=-float("inf")).to(tl.float32)
    own = tl.load(row_ptr + own_token).to(tl.float32)
    top = tl.max(logits, axis=0)
    # Of a part that is -inf throughout the sum is 0; NaN stays NaN.
    total = tl.sum(tl.exp(logits - tl.where(top > -float("inf"), top, 0.0)), axis=0)
    at = scored * num_parts + part
    tl.store(sums_ptr + 3 * at, top)
    tl.store(sums_ptr + 3 * at + 1, total)
    tl.store(sums_ptr + 3 * at + 2, tl.sum((logits > own).to(tl.float32), axis=0))

    ordered = order_key(tl.where(logits == 0, 0.0, logits))  # 0 and -0 are equal
    keys = tl.where(is_token, (ordered.to(tl.int64) << 32) | (ids ^ LAST), LOWEST)
    for place in range(num_top):
        best = tl.max(keys, axis=0)
        tl.store(keys_ptr + at * num_top + place, best)
        keys = tl.where(keys == best, LOWEST, keys)


@triton.jit(do_not_specialize=["tokens_ptr", "rows_ptr", "num_top"])
def merge_kernel(
    logits_ptr, stride_row, tokens_ptr, rows_ptr, sums_ptr, keys_ptr, words_ptr, num_parts, num_top,
    PARTS: tl.constexpr,
):  # fmt: skip
    """A row's words, from its parts."""
    scored = tl.program_id(0).to(tl.int64)
    row, own_token = row_and_token(tokens_ptr, rows_ptr, scored)
    own = tl.load(logits_ptr + row * stride_row + own_token).to(tl.float32)
    parts = tl.arange(0, PARTS)
    is_part = parts < num_parts
    at = scored * num_parts + parts
    tops = tl.load(sums_ptr + 3 * at, mask=is_part, other=-float("inf"))
    totals = tl.load(sums_ptr + 3 * at + 1, mask=is_part, other=0.0)
    num_likelier = tl.sum(tl.load(sums_ptr + 3 * at + 2, mask=is_part, other=0.0), axis=0)
    top = tl.max(tops, axis=0)
    log_total = tl.log(tl.sum(totals * tl.exp(tops - top), axis=0))
    words_ptr += scored * (2 + 2 * num_top)
    tl.store(words_ptr, (own - top - log_total).to(tl.int32, bitcast=True))
    tl.store(words_ptr + 1 + num_top, num_likelier.to(tl.int32))

    # Each part's likeliest that is not taken yet: the best of them is the next one.
    taken = tl.zeros((PARTS,), tl.int32)
    heads = tl.load(keys_ptr + at * num_top, mask=is_part & (taken < num_top), other=LOWEST)
    for place in range(num_top):
        best = tl.max(heads, axis=0)
        ordered = (best >> 32).to(tl.int32)
        bits = tl.where(ordered < 0, ordered ^ LAST, ordered)
        logprob = bits.to(tl.float32, bitcast=True) - top - log_total
        tl.store(words_ptr + 1 + place, logprob.to(tl.int32, bitcast=True))
        tl.store(words_ptr + 2 + num_top + place, best.to(tl.int32) ^ LAST)
        is_best = heads == best
        taken += is_best.to(tl.int32)
        following = tl.load(keys_ptr + at * num_top + taken, mask=is_best & (taken < num_top), other=LOWEST)
        heads = tl.where(is_best, following, heads)
