"""Sampling in Triton: one pass over the logits, and for top_k, top_p and min_p a search among the few likely tokens.

No sort, no host synchronisation, no branch on the host that depends on data: a CUDA graph can hold it. It gives what
`sampling_reference.sample` gives; filters never sort the vocabulary but bisect on the scores' bits:

    scan    (row, segment of 4,096 tokens): best token; for filtered rows the likeliest of each group of 64 as well
    pick    (row): best segment
    filter  (row): the k-th likeliest group bounds the k-th likeliest token, so the groups below it need not be read

Shapes: L rows of logits, V vocabulary, S segments of a row, G groups of a row.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.sampling_reference import NOT_FINITE

__all__ = ["keep_tokens", "sample"]

SEGMENT = 4096
GROUP = 64
ROWS = 128  # whose tokens a program keeps
TILE = tl.constexpr(4096)  # tokens that the filter looks at together
FIRST_GROUPS = tl.constexpr(128)  # groups that top_p alone looks at first; eight times more until they hold its mass
ALL = tl.constexpr(0xFFFFFFFF)


def sample(
    logits_LV: Tensor,
    *,
    temperature_L: Tensor,
    top_k_L: Tensor,
    top_p_L: Tensor,
    min_p_L: Tensor,
    seeds_L: Tensor,
    positions_L: Tensor,
    is_random: bool = True,
    is_filtered: bool = True,
) -> tuple[Tensor, Tensor]:
    """One token per row -> tokens_L (int32), is_finite_L (bool); see `sampling_reference.sample`.

    Logits of any float dtype, contiguous in the vocabulary; parameters fp32 or int32, seeds int64.
    """
    num_rows, vocab_size = logits_LV.shape
    num_segments, num_groups = triton.cdiv(vocab_size, SEGMENT), triton.cdiv(vocab_size, GROUP)
    is_filtered = is_filtered and is_random
    make = partial(torch.empty, device=logits_LV.device)
    tokens_L, is_finite_L = make(num_rows, dtype=torch.int32), make(num_rows, dtype=torch.bool)
    if num_rows == 0:
        return tokens_L, is_finite_L
    best_scores_LS, masses_LS = make(2, num_rows, num_segments, dtype=torch.float32)
    best_tokens_LS = make(num_rows, num_segments, dtype=torch.int32)
    num_listed = num_groups if is_filtered else 0
    group_tops_LG = make(num_rows, num_listed, dtype=torch.float32)
    listed_LG = make(num_rows, num_listed, dtype=torch.int32)
    rows = (logits_LV, logits_LV.stride(0), temperature_L, top_k_L, top_p_L, min_p_L, seeds_L, positions_L)
    sizes = (vocab_size, num_segments, num_groups)
    segments_padded = triton.next_power_of_2(num_segments)
    scan_kernel[(num_segments, num_rows)](
        *rows,
        *(best_scores_LS, best_tokens_LS, masses_LS, group_tops_LG, *sizes),
        SEGMENT=SEGMENT,
        GROUP=GROUP,
        IS_RANDOM=is_random,
        IS_FILTERED=is_filtered,
        num_warps=8,
    )
    pick_kernel[(num_rows,)](
        *(best_scores_LS, best_tokens_LS, tokens_L, is_finite_L, num_segments),
        SEGMENTS=segments_padded,
        num_warps=1,
    )
    if is_filtered:
        filter_kernel[(num_rows,)](
            *rows,
            *(best_scores_LS, masses_LS, group_tops_LG, listed_LG, tokens_L, is_finite_L, *sizes),
            SEGMENTS=segments_padded,
            GROUPS=triton.next_power_of_2(num_groups),
            GROUP=GROUP,
            num_warps=8,
        )
    return tokens_L, is_finite_L


def keep_tokens(tokens_L: Tensor, is_finite_L: Tensor, *, seats_L: Tensor, last_tokens_S: Tensor) -> Tensor:
    """`sampling_reference.keep_tokens` in one launch."""
    samples_L = torch.empty_like(tokens_L)
    num_rows = len(tokens_L)
    keep_kernel[(triton.cdiv(num_rows, ROWS),)](
        *(tokens_L, is_finite_L, seats_L, last_tokens_S, samples_L, num_rows), ROWS=ROWS, FAILED=NOT_FINITE, num_warps=4
    )
    return samples_L


@triton.jit
def mix(x):
    """lowbias32 on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed, position):
    """Two uint32 words from an int64 seed and an int32 position."""
    golden = tl.full((), 0x9E3779B9, tl.uint32)
    low = mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ golden)
    high = mix(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ low)
    first = mix(high ^ (position.to(tl.uint32) * golden))
    return first, mix(first + low + golden)


@triton.jit
def gumbel_noise(ids, first, second):
    """Standard Gumbel noise of token ids."""
    x = mix(ids.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)) ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + second) * 0x846CA68B
    x = x ^ (x >> 16)
    uniform = ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def is_row_filtered(temperature, top_k, top_p, min_p, vocab_size):
    """Whether a row leaves tokens out before it samples."""
    return (temperature > 0) & (((top_k > 0) & (top_k < vocab_size)) | (top_p < 1) | (min_p > 0))


@triton.jit
def scale(logits, temperature):
    """fp32 scores, rounded as torch's division rounds; greedy rows as they are. -0 becomes 0, for ties by bits."""
    scores = logits.to(tl.float32)
    scores = tl.div_rn(scores, tl.zeros_like(scores) + tl.where(temperature > 0, temperature, 1.0))
    return tl.where(scores == 0, 0.0, scores)


@triton.jit
def order_key(scores):
    """int32 keys that sort as the fp32 scores do."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def distance(scores, top_key):
    """How many floats a score is below the top: uint32, 0 for the top itself."""
    return top_key.to(tl.uint32, bitcast=True) - order_key(scores).to(tl.uint32, bitcast=True)


# Few numbers of a row each: whether they are aligned, which depends on the rows, must not recompile.
SMALL = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seeds_ptr", "positions_ptr", "masses_ptr"]


@triton.jit(do_not_specialize=SMALL)
def scan_kernel(
    logits_ptr, stride_row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    best_scores_ptr, best_tokens_ptr, masses_ptr, group_tops_ptr, vocab_size, num_segments, num_groups,
    SEGMENT: tl.constexpr, GROUP: tl.constexpr, IS_RANDOM: tl.constexpr, IS_FILTERED: tl.constexpr,
):  # fmt: skip
    """Best token of a segment, -1 if a logit is NaN or +inf. In a filtered row: without noise, group maxima, mass."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = segment * SEGMENT + tl.arange(0, SEGMENT)
    logits = tl.load(logits_ptr + row * stride_row + ids, mask=ids < vocab_size, other=-float("inf")).to(tl.float32)
    scores = logits
    at = row * num_segments + segment
    if IS_RANDOM:
        temperature = tl.load(temperature_ptr + row)
        scores = scale(logits, temperature)
        is_filtered = False
        if IS_FILTERED:
            is_filtered = is_row_filtered(
                temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), vocab_size
            )
        if is_filtered:
            groups = segment * (SEGMENT // GROUP) + tl.arange(0, SEGMENT // GROUP)
            tops = tl.max(tl.reshape(scores, (SEGMENT // GROUP, GROUP)), axis=1)
            tl.store(group_tops_ptr + row * num_groups + groups, tops, mask=groups < num_groups)
            top = tl.max(tops, axis=0)
            weights = tl.where(scores > -float("inf"), tl.exp(scores - top), 0.0)
            tl.store(masses_ptr + at, tl.sum(weights, axis=0))
        elif temperature > 0:
            first, second = row_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            scores += gumbel_noise(ids, first, second)
    is_bad = tl.max(((logits != logits) | (logits == float("inf"))).to(tl.int32), axis=0)
    best, index = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_scores_ptr + at, best)
    tl.store(best_tokens_ptr + at, tl.where(is_bad > 0, -1, segment * SEGMENT + index))


@triton.jit
def pick_kernel(best_scores_ptr, best_tokens_ptr, tokens_ptr, is_finite_ptr, num_segments, SEGMENTS: tl.constexpr):
    """The best segment's token; of equal scores the lowest token."""
    row = tl.program_id(0).to(tl.int64)
    segments = tl.arange(0, SEGMENTS)
    is_segment = segments < num_segments
    scores = tl.load(best_scores_ptr + row * num_segments + segments, mask=is_segment, other=-float("inf"))
    tokens = tl.load(best_tokens_ptr + row * num_segments + segments, mask=is_segment, other=0)
    best = tl.max(scores, axis=0)
    is_finite = (tl.min(tokens, axis=0) >= 0) & (best > -float("inf"))
    token = tl.min(tl.where((scores == best) & is_segment, tokens, 0x7FFFFFFF), axis=0)
    tl.store(tokens_ptr + row, tl.where(is_finite, token, 0))
    tl.store(is_finite_ptr + row, is_finite)


@triton.jit
def load_tile(row_ptr, listed_ptr, start, num_listed, temperature, vocab_size, GROUP: tl.constexpr):
    """Ids and scores of a tile of the listed groups' tokens; -inf beyond them."""
    index = start + tl.arange(0, TILE)
    is_listed = index < num_listed * GROUP
    ids = tl.load(listed_ptr + index // GROUP, mask=is_listed, other=0) * GROUP + index % GROUP
    is_listed = is_listed & (ids < vocab_size)
    return ids, is_listed, scale(tl.load(row_ptr + ids, mask=is_listed, other=-float("inf")), temperature)


@triton.jit
def weigh(
    row_ptr, listed_ptr, num_listed, temperature, vocab_size, top, a, b, c, IS_MASS: tl.constexpr, GROUP: tl.constexpr
):
    """Count, or mass relative to the top's, of the listed tokens within distance a, b and c (int64) of the top."""
    top_key = order_key(top)
    sum_a, sum_b, sum_c = 0.0, 0.0, 0.0
    for start in range(0, num_listed * GROUP, TILE):
        _, is_listed, scores = load_tile(row_ptr, listed_ptr, start, num_listed, temperature, vocab_size, GROUP)
        away = distance(scores, top_key)
        weights = tl.where(is_listed, tl.exp(scores - top) if IS_MASS else 1.0, 0.0)
        sum_a += tl.sum(tl.where(away <= a.to(tl.uint32), weights, 0.0), axis=0)
        sum_b += tl.sum(tl.where(away <= b.to(tl.uint32), weights, 0.0), axis=0)
        sum_c += tl.sum(tl.where(away <= c.to(tl.uint32), weights, 0.0), axis=0)
    return sum_a, sum_b, sum_c


@triton.jit
def nearest(
    row_ptr, listed_ptr, num_listed, temperature, vocab_size, top, target, high,
    IS_MASS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The smallest distance (int64) within which the listed tokens' count or mass reaches `target`; `high` does."""
    low = tl.full((), -1, tl.int64)
    while high - low > 1:
        quarter = (high - low + 3) // 4
        a = low + quarter
        b = tl.minimum(a + quarter, high)
        c = tl.minimum(b + quarter, high)
        sum_a, sum_b, sum_c = weigh(
            row_ptr, listed_ptr, num_listed, temperature, vocab_size, top, a, b, c, IS_MASS, GROUP
        )
        new_low = tl.where(sum_a >= target, low, tl.where(sum_b >= target, a, tl.where(sum_c >= target, b, c)))
        high = tl.where(sum_a >= target, a, tl.where(sum_b >= target, b, tl.where(sum_c >= target, c, high)))
        low = new_low
    return high


@triton.jit
def list_groups(group_tops_ptr, listed_ptr, num_groups, top, at_least, num_wanted, GROUPS: tl.constexpr):
    """List, in order, the groups whose likeliest token is among the `num_wanted` best of groups (ties included).

    It must be no less likely than `at_least` times the top. -> how many, and the distance (int64) of the last wanted.
    """
    groups = tl.arange(0, GROUPS)
    is_group = groups < num_groups
    tops = tl.load(group_tops_ptr + groups, mask=is_group, other=-float("inf"))
    away = distance(tops, order_key(top))
    low, high = tl.full((), -1, tl.int64), tl.full((), ALL, tl.int64)
    if num_wanted < num_groups:
        while high - low > 1:
            middle = (low + high) // 2
            num_within = tl.sum(((away <= middle.to(tl.uint32)) & is_group).to(tl.int32), axis=0)
            low = tl.where(num_within >= num_wanted, low, middle)
            high = tl.where(num_within >= num_wanted, middle, high)
    is_wanted = is_group & (away <= high.to(tl.uint32)) & (tl.exp(tops - top) >= at_least)
    places = tl.cumsum(is_wanted.to(tl.int32), axis=0) - 1
    tl.debug_barrier()
    tl.store(listed_ptr + places, groups, mask=is_wanted)
    tl.debug_barrier()
    return tl.sum(is_wanted.to(tl.int32), axis=0), high


@triton.jit(do_not_specialize=SMALL)
def filter_kernel(
    logits_ptr, stride_row, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    best_scores_ptr, masses_ptr, group_tops_ptr, listed_ptr, tokens_ptr, is_finite_ptr,
    vocab_size, num_segments, num_groups,
    SEGMENTS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Token of a filtered row: find how far from the top tokens are kept, then add noise to those alone."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    is_finite = tl.load(is_finite_ptr + row) != 0
    if is_finite & is_row_filtered(temperature, top_k, top_p, min_p, vocab_size):
        row_ptr = logits_ptr + row * stride_row
        tops_ptr, list_ptr = group_tops_ptr + row * num_groups, listed_ptr + row * num_groups
        segments = tl.arange(0, SEGMENTS)
        is_segment = segments < num_segments
        tops = tl.load(best_scores_ptr + row * num_segments + segments, mask=is_segment, other=-float("inf"))
        masses = tl.load(masses_ptr + row * num_segments + segments, mask=is_segment, other=0.0)
        top = tl.max(tops, axis=0)
        total = tl.sum(masses * tl.exp(tops - top), axis=0)
        is_in_k = (top_k > 0) & (top_k < vocab_size)

        # 1. A list of groups that surely holds every kept token, all within distance `high`.
        if is_in_k:
            num_listed, high = list_groups(tops_ptr, list_ptr, num_groups, top, 0.0, top_k, GROUPS)
            high = nearest(
                row_ptr, list_ptr, num_listed, temperature, vocab_size, top, top_k.to(tl.float32), high, False, GROUP
            )
            total, _, _ = weigh(
                row_ptr, list_ptr, num_listed, temperature, vocab_size, top, high, high, high, True, GROUP
            )
        elif top_p < 1:
            num_wanted = FIRST_GROUPS
            num_listed, high = list_groups(tops_ptr, list_ptr, num_groups, top, 0.0, num_wanted, GROUPS)
            mass, _, _ = weigh(
                row_ptr, list_ptr, num_listed, temperature, vocab_size, top, high, high, high, True, GROUP
            )
            while (mass < top_p * total) & (num_wanted < num_groups):
                num_wanted *= 8
                num_listed, high = list_groups(tops_ptr, list_ptr, num_groups, top, 0.0, num_wanted, GROUPS)
                mass, _, _ = weigh(
                    row_ptr, list_ptr, num_listed, temperature, vocab_size, top, high, high, high, True, GROUP
                )
        else:
            num_listed, high = list_groups(tops_ptr, list_ptr, num_groups, top, min_p, num_groups, GROUPS)

        # 2. Top_p keeps tokens while those before them hold less than its mass: of equal ones the highest ids first.
        num_ties_out = 0.0
        if top_p < 1:
            target = top_p * total
            high = nearest(row_ptr, list_ptr, num_listed, temperature, vocab_size, top, target, high, True, GROUP)
            above, upto, _ = weigh(
                row_ptr, list_ptr, num_listed, temperature, vocab_size, top, high - 1, high, high, True, GROUP
            )
            num_above, num_upto, _ = weigh(
                row_ptr, list_ptr, num_listed, temperature, vocab_size, top, high - 1, high, high, False, GROUP
            )
            above, num_above = tl.where(high > 0, above, 0.0), tl.where(high > 0, num_above, 0.0)
            num_ties = num_upto - num_above
            num_ties_out = num_ties - tl.maximum(tl.ceil((target - above) * num_ties / (upto - above)), 1.0)

        # 3. Gumbel-max over what is kept, in the order of token ids.
        first, second = row_keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        best_score, best_token, num_ties_seen = -float("inf"), 0, 0.0
        for start in range(0, num_listed * GROUP, TILE):
            ids, is_listed, scores = load_tile(row_ptr, list_ptr, start, num_listed, temperature, vocab_size, GROUP)
            away = distance(scores, order_key(top))
            is_tie = is_listed & (away == high.to(tl.uint32))
            tie_number = num_ties_seen + tl.cumsum(is_tie.to(tl.float32), axis=0)
            num_ties_seen += tl.sum(is_tie.to(tl.float32), axis=0)
            is_kept = is_listed & (away <= high.to(tl.uint32)) & (tl.exp(scores - top) >= min_p)
            is_kept = is_kept & ((is_tie == 0) | (tie_number > num_ties_out))
            noisy = tl.where(is_kept, scores + gumbel_noise(ids, first, second), -float("inf"))
            score, index = tl.max(noisy, axis=0, return_indices=True, return_indices_tie_break_left=True)
            token = tl.sum(tl.where(tl.arange(0, TILE) == index, ids, 0), axis=0)
            best_token = tl.where(score > best_score, token, best_token)
            best_score = tl.maximum(score, best_score)
        tl.store(tokens_ptr + row, best_token)


@triton.jit(do_not_specialize=["tokens_ptr", "is_finite_ptr", "seats_ptr", "samples_ptr", "num_rows"])
def keep_kernel(
    tokens_ptr, is_finite_ptr, seats_ptr, last_tokens_ptr, samples_ptr, num_rows,
    ROWS: tl.constexpr, FAILED: tl.constexpr,
):  # fmt: skip
    """A tile of rows: their tokens to their seats and to the samples."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    tokens = tl.load(tokens_ptr + rows, mask=is_row, other=0)
    is_finite = tl.load(is_finite_ptr + rows, mask=is_row, other=0) != 0
    tl.store(last_tokens_ptr + tl.load(seats_ptr + rows, mask=is_row, other=0), tokens, mask=is_row)
    tl.store(samples_ptr + rows, tl.where(is_finite, tokens, FAILED), mask=is_row)
