"""Sampling as plain torch with a sort of the whole vocabulary: the oracle, and the definition of the noise.

A token depends on (logits, seed, position) alone: noise is a hash of (seed, position, token id), in integers that come
out the same on every device. It knows no requests and no batches.
Shapes: L rows of logits, V vocabulary, S seats.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "NOT_FINITE",
    "gumbel_noise",
    "keep_mask",
    "keep_tokens",
    "row_keys",
    "sample",
    "scale_logits",
    "token_hashes",
]

NOT_FINITE = -1
"""In place of a token: this row's logits were not finite."""

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: spreads consecutive numbers
MULTIPLY_1, MULTIPLY_2 = 0x7FEB352D, 0x846CA68B  # lowbias32 (C. Wellons, "Prospecting for Hash Functions")


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64); each input bit flips each output bit about half the time."""
    x = x ^ (x >> 16)
    x = (x * MULTIPLY_1) & MASK
    x = x ^ (x >> 15)
    x = (x * MULTIPLY_2) & MASK
    return x ^ (x >> 16)


def row_keys(seeds_L: Tensor, positions_L: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words per row (in int64) from its seed (64 bits) and position."""
    seeds_L = seeds_L.long()
    low_L = mix((seeds_L & MASK) ^ GOLDEN)
    high_L = mix(((seeds_L >> 32) & MASK) ^ low_L)
    first_L = mix(high_L ^ ((positions_L.long() * GOLDEN) & MASK))
    return first_L, mix((first_L + low_L + GOLDEN) & MASK)


def token_hashes(token_ids: Tensor) -> Tensor:
    """A 32-bit word per token id (in int64), the part of the noise that all rows share."""
    return mix((token_ids.long() * GOLDEN) & MASK)


def gumbel_noise(seeds_L: Tensor, positions_L: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise [L, tokens] in fp32, between -2.9 and 16.7.

    `token_ids` is one list for all rows. The last hash takes the row's second key in its middle. 23 bits make a
    uniform number strictly inside (0, 1), exact in fp32.
    """
    first_L, second_L = row_keys(seeds_L, positions_L)
    x = token_hashes(token_ids)[None, :] ^ first_L[:, None]
    x = x ^ (x >> 16)
    x = (x * MULTIPLY_1) & MASK
    x = ((x ^ (x >> 15)) + second_L[:, None]) & MASK
    x = (x * MULTIPLY_2) & MASK
    x = x ^ (x >> 16)
    uniform = ((x >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def scale_logits(logits_LV: Tensor, temperature_L: Tensor) -> Tensor:
    """fp32 logits over the temperature; greedy rows (temperature 0) as they are."""
    return logits_LV.float() / torch.where(temperature_L > 0, temperature_L, 1.0)[:, None]


def keep_mask(scores_LV: Tensor, top_k_L: Tensor, top_p_L: Tensor, min_p_L: Tensor) -> Tensor:
    """Which tokens survive top_k, then top_p, then min_p -> bool [L, V]; the sets that transformers' warpers keep.

    (Theirs with a stable sort. Theirs is not, so that of equal tokens at top_p's edge they keep as many, but any.)

    top_k (off where <= 0) keeps ties with the k-th. top_p (off where >= 1) removes tokens, the least likely first and
    of equal ones the lowest id first, while what is removed is at most 1 - top_p. min_p (off at 0) removes tokens less
    likely than min_p times the most likely one. The most likely token always stays.
    """
    vocab_size = scores_LV.shape[1]
    ascending_LV, order_LV = torch.sort(scores_LV, dim=-1, stable=True)
    smallest_L1 = (vocab_size - torch.where(top_k_L > 0, top_k_L, vocab_size).clamp(max=vocab_size)).long()[:, None]
    is_in_k_LV = ascending_LV >= ascending_LV.gather(1, smallest_L1)
    kept_LV = torch.where(is_in_k_LV, ascending_LV, float("-inf"))
    removed_LV = kept_LV.softmax(-1).cumsum(-1)
    is_in_p_LV = (removed_LV > (1.0 - top_p_L)[:, None]) | (top_p_L >= 1.0)[:, None]
    is_in_p_LV[:, -1] = True
    probs_LV = torch.where(is_in_p_LV, kept_LV, float("-inf")).softmax(-1)
    is_likely_LV = probs_LV >= min_p_L[:, None] * probs_LV[:, -1:]
    is_kept_LV = is_in_k_LV & is_in_p_LV & is_likely_LV
    return torch.empty_like(is_kept_LV).scatter_(1, order_LV, is_kept_LV)


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
    """One token per row -> tokens_L (int32), is_finite_L (bool).

    Greedy where temperature is 0; of equal scores the lowest token id wins. A row is not finite if a logit is NaN or
    +inf or all are -inf (-inf forbids a token); its token is 0. False in `is_random` or `is_filtered` promises that no
    row is so.
    """
    is_finite_L = logits_LV.amax(-1).isfinite()  # amax passes NaN on
    scores_LV = scale_logits(logits_LV, temperature_L)
    is_random_L1 = (temperature_L > 0)[:, None]
    if is_filtered:
        is_kept_LV = keep_mask(scores_LV, top_k_L, top_p_L, min_p_L) | ~is_random_L1
        scores_LV = torch.where(is_kept_LV, scores_LV, float("-inf"))
    if is_random:
        token_ids = torch.arange(logits_LV.shape[1], device=logits_LV.device)
        noise_LV = gumbel_noise(seeds_L, positions_L, token_ids)
        scores_LV = torch.where(is_random_L1, scores_LV + noise_LV, scores_LV)
    tokens_L = torch.where(is_finite_L, scores_LV.argmax(-1), 0)
    return tokens_L.int(), is_finite_L


def keep_tokens(tokens_L: Tensor, is_finite_L: Tensor, *, seats_L: Tensor, last_tokens_S: Tensor) -> Tensor:
    """Note the seats' last tokens, of several for a seat any -> samples_L, NOT_FINITE where a row failed."""
    last_tokens_S[seats_L] = tokens_L
    return torch.where(is_finite_L, tokens_L, NOT_FINITE)
