"""Edits of logits in plain torch: penalties, biases, bans and masks. The oracle, and what a CPU runs.

A seat's parameters are 32-bit words, its *profile*; its tokens are counted, and kept by position. A step's edited rows
of logits come as columns, and nothing else need come from the host. It knows no requests.

    columns  | row of logits | seat | position | first | input | counted | mask |

Position is that of the token to be sampled, first the first one sampled in the seat's step (between them are drafts).
Input is the token before position, -1 if it is the seat's last. Tokens before `counted` are counted already; those up
to `first` are certain. Mask is the row's own among the step's masks, -1 for none.

Shapes: L rows of logits, K edited ones, V vocabulary, S seats, P words of a profile, N positions, M masks, W = V / 32
words of one, C tokens to be counted, D drafts, B biases, Q bad words, U their tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.sampling_reference import NOT_FINITE

__all__ = ["NO_TOKEN", "NUM_EDIT_COLUMNS", "UNMATCHED", "Profile", "edit_logits", "keep_edited", "note_inputs"]

NUM_EDIT_COLUMNS = 7
NO_TOKEN = -1
UNMATCHED = -2
"""In place of a token that no bad word may begin with."""


class Profile(NamedTuple):
    """Where a seat's words lie: where each field begins, and the last one ends."""

    penalties: int  # repetition, presence, frequency: fp32 bits
    numbers: int  # tokens of the prompt, length before which no stop token is drawn, biases, bad words
    biased: int
    biases: int  # fp32 bits
    bad_words: int  # [Q, U], right-aligned, NO_TOKEN before them
    allowed: int  # bit i of word w: token 32 w + i
    stops: int
    size: int
    bad_word_len: int  # U


def note_inputs(columns_7K: Tensor, *, last_tokens_S: Tensor, history_SN: Tensor, counts_SV: Tensor) -> None:
    """Write the edited rows' input tokens into the seats' history, and count what is certain by now.

    A seat's count of a token: twice its occurrences in the output, plus 1 if the prompt has it.
    """
    _, seats_K, positions_K, firsts_K, inputs_K, counted_K, _ = columns_7K.long()
    inputs_K = torch.where(inputs_K == NO_TOKEN, last_tokens_S[seats_K], inputs_K)
    history_SN[seats_K, positions_K - 1] = inputs_K.int()
    num_K = torch.where(positions_K == firsts_K, firsts_K - counted_K, 0).clamp(min=0)
    owners_C = torch.repeat_interleave(num_K)
    within_C = torch.arange(len(owners_C), device=owners_C.device) - (num_K.cumsum(0) - num_K)[owners_C]
    seats_C = seats_K[owners_C]
    tokens_C = history_SN[seats_C, counted_K[owners_C] + within_C].long()
    places_C = seats_C * counts_SV.shape[1] + tokens_C
    counts_SV.view(-1).index_add_(0, places_C, torch.full_like(places_C, 2, dtype=torch.int32))


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
    """Edited logits of the columns' rows -> scores_KV, fp32: biased, then penalised; -inf where a token is forbidden.

    Penalties: repetition (Keskar et al. 2019, CTRL, section 4.1; prompt and output), then presence and frequency
    (OpenAI's; output alone). Drafts before a position count as output.
    """
    rows_K, seats_K, positions_K, firsts_K, _, _, own_K = columns_7K.long()
    words_KP = profiles_SP[seats_K]
    scores_KV = logits_LV[rows_K].float()
    num_prompt_K, min_len_K, num_biases_K, num_bad_words_K = words_KP[:, profile.numbers : profile.biased].unbind(1)
    if bool(num_biases_K.any()):
        biases_KB = words_KP[:, profile.biases : profile.bad_words].contiguous().view(torch.float32)
        scores_KV.scatter_add_(1, words_KP[:, profile.biased : profile.biases].long(), biases_KB)
    if bool(num_bad_words_K.any()):
        words_KQU = words_KP[:, profile.bad_words : profile.allowed].unflatten(1, (-1, profile.bad_word_len))
        ban(scores_KV, words_KQU, history_SN[seats_K], positions_K, num_prompt_K)
    num_drafts = int((positions_K - firsts_K).max())
    places_KD = firsts_K[:, None] + torch.arange(num_drafts, device=rows_K.device)
    is_draft_KD = places_KD < positions_K[:, None]
    drafts_KD = history_SN[seats_K[:, None], torch.where(is_draft_KD, places_KD, 0)]
    counts_KV = counts_SV[seats_K].scatter_add_(1, drafts_KD.long(), is_draft_KD.int() * 2)
    penalties_K3 = words_KP[:, profile.penalties : profile.numbers].contiguous().view(torch.float32)
    penalise(scores_KV, counts_KV, penalties_K3)
    stops_KW = words_KP[:, profile.stops : profile.size]
    mask_KW = words_KP[:, profile.allowed : profile.stops]
    mask_KW = mask_KW & ~torch.where((positions_K >= min_len_K)[:, None], 0, stops_KW)
    if masks_MW is not None:
        mask_KW &= torch.where(own_K[:, None] >= 0, masks_MW[own_K.clamp(min=0)], -1)
    bits = torch.arange(32, dtype=torch.int32, device=mask_KW.device)
    is_allowed_KV = ((mask_KW[:, :, None] >> bits) & 1).flatten(1)[:, : scores_KV.shape[1]] != 0
    return scores_KV.masked_fill_(~is_allowed_KV, float("-inf"))


def penalise(scores_KV: Tensor, counts_KV: Tensor, penalties_K3: Tensor) -> None:
    """Penalise scores for tokens seen before, in place."""
    repetition_K1, presence_K1, frequency_K1 = penalties_K3.split(1, dim=1)
    repeated_KV = torch.where(scores_KV > 0, scores_KV / repetition_K1, scores_KV * repetition_K1)
    scores_KV.copy_(torch.where(counts_KV > 0, repeated_KV, scores_KV))
    num_output_KV = counts_KV >> 1
    scores_KV -= frequency_K1 * num_output_KV
    scores_KV -= torch.where(num_output_KV > 0, presence_K1, 0.0)


def ban(scores_KV: Tensor, words_KQU: Tensor, history_KN: Tensor, positions_K: Tensor, num_prompt_K: Tensor) -> None:
    """Forbid the last token of each bad word whose other tokens are the output's latest."""
    places_KU = positions_K[:, None] + torch.arange(1 - words_KQU.shape[2], 0, device=positions_K.device)
    latest_KU = history_KN.gather(1, places_KU.clamp(min=0))
    latest_KU = torch.where(places_KU >= num_prompt_K[:, None], latest_KU, UNMATCHED)
    prefixes_KQU, lasts_KQ = words_KQU[:, :, :-1], words_KQU[:, :, -1]
    is_next_KQ = ((prefixes_KQU == NO_TOKEN) | (prefixes_KQU == latest_KU[:, None])).all(-1) & (lasts_KQ >= 0)
    bans_KQ = torch.zeros_like(lasts_KQ, dtype=torch.float32).masked_fill_(is_next_KQ, float("-inf"))
    scores_KV.scatter_add_(1, lasts_KQ.clamp(min=0).long(), bans_KQ)


def keep_edited(
    tokens_K: Tensor, is_finite_K: Tensor, columns_7K: Tensor, *, samples_L: Tensor, last_tokens_S: Tensor
) -> None:
    """Edited rows' tokens in place of their samples (NOT_FINITE where a row failed) and of their seats' last tokens."""
    samples_L[columns_7K[0]] = torch.where(is_finite_K, tokens_K, NOT_FINITE)
    last_tokens_S[columns_7K[1]] = tokens_K
