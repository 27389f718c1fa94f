"""Edits of logits in Triton: a launch for a step's inputs, one for the edited rows' scores, one for their samples.

They give the bits that `edits_reference` gives, which states the rules and has the layout of columns and profiles.
Shapes: L rows of logits, K edited ones, V vocabulary, S seats, P words of a profile, N positions, M masks, W = V / 32
words of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.edits_reference import Profile
from minillm.kernels.sampling_reference import NOT_FINITE

__all__ = ["edit_logits", "keep_edited", "note_inputs"]

SEGMENT = 4096
ROWS = 128  # whose tokens a program keeps


def note_inputs(columns_7K: Tensor, *, last_tokens_S: Tensor, history_SN: Tensor, counts_SV: Tensor) -> None:
    """`edits_reference.note_inputs`; tensors contiguous, int32."""
    num_rows = columns_7K.shape[1]
    sizes = (num_rows, history_SN.shape[1], counts_SV.shape[1])
    note_kernel[(num_rows,)](columns_7K, last_tokens_S, history_SN, counts_SV, *sizes, num_warps=1)


def edit_logits(
    logits_LV: Tensor,
    columns_7K: Tensor,
    *,
    profiles_SP: Tensor,
    profile: Profile,
    counts_SV: Tensor,
    history_SN: Tensor,
    masks_MW: Tensor | None = None,
) -> Tensor:
    """`edits_reference.edit_logits`; logits contiguous in the vocabulary, all others contiguous and int32."""
    num_rows, vocab_size = columns_7K.shape[1], logits_LV.shape[1]
    scores_KV = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits_LV.device)
    masks_MW = columns_7K if masks_MW is None else masks_MW  # which no row reads
    edit_kernel[(num_rows, triton.cdiv(vocab_size, SEGMENT))](
        *(logits_LV, columns_7K, profiles_SP, counts_SV, history_SN, masks_MW, scores_KV),
        *(num_rows, vocab_size, logits_LV.stride(0), history_SN.shape[1], profile.size - profile.stops),
        PENALTIES=profile.penalties,
        NUMBERS=profile.numbers,
        BIASED=profile.biased,
        BIASES=profile.biases,
        BAD_WORDS=profile.bad_words,
        ALLOWED=profile.allowed,
        STOPS=profile.stops,
        SIZE=profile.size,
        BAD_WORD_LEN=profile.bad_word_len,
        SEGMENT=SEGMENT,
        num_warps=8,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the twin rounds twice
    )
    return scores_KV


def keep_edited(
    tokens_K: Tensor, is_finite_K: Tensor, columns_7K: Tensor, *, samples_L: Tensor, last_tokens_S: Tensor
) -> None:
    """`edits_reference.keep_edited` in one launch."""
    num_rows = len(tokens_K)
    keep_edited_kernel[(triton.cdiv(num_rows, ROWS),)](
        *(tokens_K, is_finite_K, columns_7K, samples_L, last_tokens_S, num_rows),
        ROWS=ROWS,
        FAILED=NOT_FINITE,
        num_warps=4,
    )


# Columns lie within a step's packed words: how they are aligned, and how many there are, must not recompile.
@triton.jit(do_not_specialize=["columns_ptr", "num_rows"])
def note_kernel(columns_ptr, last_tokens_ptr, history_ptr, counts_ptr, num_rows, num_positions, vocab_size):
    """An edited row. Of a seat's rows the first counts; what it reads was written by earlier steps."""
    row = tl.program_id(0)
    seat = tl.load(columns_ptr + num_rows + row).to(tl.int64)
    position = tl.load(columns_ptr + 2 * num_rows + row)
    first = tl.load(columns_ptr + 3 * num_rows + row)
    token = tl.load(columns_ptr + 4 * num_rows + row)
    if token < 0:
        token = tl.load(last_tokens_ptr + seat)
    tl.store(history_ptr + seat * num_positions + position - 1, token)
    if position == first:
        for place in range(tl.load(columns_ptr + 5 * num_rows + row), first):
            earlier = tl.load(history_ptr + seat * num_positions + place, mask=place < first - 1, other=0)
            tl.atomic_add(counts_ptr + seat * vocab_size + tl.where(place < first - 1, earlier, token), 2)


@triton.jit(do_not_specialize=["columns_ptr", "masks_ptr", "num_rows"])
def edit_kernel(
    logits_ptr, columns_ptr, profiles_ptr, counts_ptr, history_ptr, masks_ptr, scores_ptr,
    num_rows, vocab_size, stride_row, num_positions, num_words,
    PENALTIES: tl.constexpr, NUMBERS: tl.constexpr, BIASED: tl.constexpr, BIASES: tl.constexpr,
    BAD_WORDS: tl.constexpr, ALLOWED: tl.constexpr, STOPS: tl.constexpr, SIZE: tl.constexpr,
    BAD_WORD_LEN: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """A segment of an edited row."""
    row, segment = tl.program_id(0), tl.program_id(1)
    ids = segment * SEGMENT + tl.arange(0, SEGMENT)
    is_token = ids < vocab_size
    logit_row = tl.load(columns_ptr + row).to(tl.int64)
    seat = tl.load(columns_ptr + num_rows + row).to(tl.int64)
    position = tl.load(columns_ptr + 2 * num_rows + row)
    first = tl.load(columns_ptr + 3 * num_rows + row)
    own_mask = tl.load(columns_ptr + 6 * num_rows + row).to(tl.int64)
    profile_ptr, tokens_ptr = profiles_ptr + seat * SIZE, history_ptr + seat * num_positions
    scores = tl.load(logits_ptr + logit_row * stride_row + ids, mask=is_token, other=0.0).to(tl.float32)

    for i in range(tl.load(profile_ptr + NUMBERS + 2)):
        token = tl.load(profile_ptr + BIASED + i)
        if token // SEGMENT == segment:
            bias = tl.load(profile_ptr + BIASES + i).to(tl.float32, bitcast=True)
            scores += tl.where(ids == token, bias, 0.0)

    # Lane u compares a bad word's token u with that token of the output; the last lane has what it forbids.
    lanes = tl.arange(0, BAD_WORD_LEN)
    places = position + 1 - BAD_WORD_LEN + lanes
    is_output = (places >= tl.load(profile_ptr + NUMBERS)) & (places < position)
    latest = tl.load(tokens_ptr + places, mask=is_output, other=-2)
    for i in range(tl.load(profile_ptr + NUMBERS + 3)):
        word = tl.load(profile_ptr + BAD_WORDS + i * BAD_WORD_LEN + lanes)
        last = tl.load(profile_ptr + BAD_WORDS + (i + 1) * BAD_WORD_LEN - 1)
        differs = (word != -1) & (word != latest) & (lanes < BAD_WORD_LEN - 1)
        if tl.max(differs.to(tl.int32), axis=0) == 0:
            scores += tl.where(ids == last, -float("inf"), 0.0)

    counts = tl.load(counts_ptr + seat * vocab_size + ids, mask=is_token, other=0)
    for place in range(first, position):
        counts += tl.where(ids == tl.load(tokens_ptr + place), 2, 0)
    repetition = tl.load(profile_ptr + PENALTIES).to(tl.float32, bitcast=True)
    presence = tl.load(profile_ptr + PENALTIES + 1).to(tl.float32, bitcast=True)
    frequency = tl.load(profile_ptr + PENALTIES + 2).to(tl.float32, bitcast=True)
    divided = tl.div_rn(scores, tl.zeros_like(scores) + repetition)
    repeated = tl.where(scores > 0, divided, scores * repetition)
    scores = tl.where(counts > 0, repeated, scores)
    num_output = counts >> 1
    scores -= frequency * num_output.to(tl.float32)
    scores -= tl.where(num_output > 0, presence, 0.0)

    mask = tl.load(profile_ptr + ALLOWED + ids // 32, mask=is_token, other=0)
    if position < tl.load(profile_ptr + NUMBERS + 1):
        mask &= ~tl.load(profile_ptr + STOPS + ids // 32, mask=is_token, other=0)
    if own_mask >= 0:
        mask &= tl.load(masks_ptr + own_mask * num_words + ids // 32, mask=is_token, other=0)
    scores = tl.where(((mask >> (ids % 32)) & 1) != 0, scores, -float("inf"))
    tl.store(scores_ptr + row.to(tl.int64) * vocab_size + ids, scores, mask=is_token)


@triton.jit(do_not_specialize=["tokens_ptr", "is_finite_ptr", "columns_ptr", "samples_ptr", "num_rows"])
def keep_edited_kernel(
    tokens_ptr, is_finite_ptr, columns_ptr, samples_ptr, last_tokens_ptr, num_rows,
    ROWS: tl.constexpr, FAILED: tl.constexpr,
):  # fmt: skip
    """A tile of edited rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    tokens = tl.load(tokens_ptr + rows, mask=is_row, other=0)
    is_finite = tl.load(is_finite_ptr + rows, mask=is_row, other=0) != 0
    samples = tl.where(is_finite, tokens, FAILED)
    tl.store(samples_ptr + tl.load(columns_ptr + rows, mask=is_row, other=0), samples, mask=is_row)
    tl.store(last_tokens_ptr + tl.load(columns_ptr + num_rows + rows, mask=is_row, other=0), tokens, mask=is_row)
