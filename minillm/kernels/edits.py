"""Penalties and masks of the rows that have them, in Triton: one pass over those rows' scores, in place.

It gives the bits that `sampling_reference.edit_scores` gives, which states the rules.
Shapes: K edited rows, V vocabulary, S seats, D drafts, W = V / 32 words of a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["edit_scores"]

SEGMENT = 4096


def edit_scores(
    scores_KV: Tensor, *, seats_K: Tensor, counts_SV: Tensor, drafts_KD: Tensor, penalties_K3: Tensor, mask_KW: Tensor
) -> None:
    """`sampling_reference.edit_scores`; tensors contiguous, scores and penalties fp32, all others int32."""
    num_rows, vocab_size = scores_KV.shape
    assert all(x.is_contiguous() for x in (scores_KV, counts_SV, drafts_KD, penalties_K3, mask_KW))
    edit_kernel[(num_rows, triton.cdiv(vocab_size, SEGMENT))](
        *(scores_KV, seats_K, counts_SV, drafts_KD, penalties_K3, mask_KW),
        *(vocab_size, drafts_KD.shape[1], mask_KW.shape[1]),
        SEGMENT=SEGMENT,
        num_warps=8,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the twin rounds twice
    )


@triton.jit(do_not_specialize=["seats_ptr", "num_drafts"])
def edit_kernel(
    scores_ptr, seats_ptr, counts_ptr, drafts_ptr, penalties_ptr, mask_ptr, vocab_size, num_drafts, num_words,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """A segment of a row."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    is_token = ids < vocab_size
    scores = tl.load(scores_ptr + row * vocab_size + ids, mask=is_token, other=0.0)
    seat = tl.load(seats_ptr + row).to(tl.int64)
    counts = tl.load(counts_ptr + seat * vocab_size + ids, mask=is_token, other=0)
    for i in range(num_drafts):
        draft = tl.load(drafts_ptr + row * num_drafts + i)
        counts += tl.where(ids == draft, 2, 0)
    repetition = tl.load(penalties_ptr + row * 3)
    presence = tl.load(penalties_ptr + row * 3 + 1)
    frequency = tl.load(penalties_ptr + row * 3 + 2)
    divided = tl.div_rn(scores, tl.zeros_like(scores) + repetition)
    repeated = tl.where(scores > 0, divided, scores * repetition)
    scores = tl.where(counts > 0, repeated, scores)
    num_output = counts >> 1
    scores -= frequency * num_output.to(tl.float32)
    scores -= tl.where(num_output > 0, presence, 0.0)
    words = tl.load(mask_ptr + row * num_words + ids // 32, mask=is_token, other=0)
    scores = tl.where(((words >> (ids % 32)) & 1) != 0, scores, -float("inf"))
    tl.store(scores_ptr + row * vocab_size + ids, scores, mask=is_token)
