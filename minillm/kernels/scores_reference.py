"""Logprobs of tokens in plain torch, with the likeliest tokens beside them. The oracle, and what a CPU runs.

Each scored token becomes 32-bit words:

    | logprobs, fp32 bits: own, likeliest k | number of likelier tokens | likeliest k |

Shapes: L rows of logits, V vocabulary, M scored tokens, k likeliest ones, X = 2 + 2 k words, Y = 1 + k logprobs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["score_tokens"]

MAX_ROWS = 64
"""Copied and widened at once: all of a step's would be large."""


def score_tokens(logits_LV: Tensor, tokens_L: Tensor, rows_M: Tensor, num_top: int) -> Tensor:
    """Words of the rows' tokens, and of the `num_top` likeliest, or all there are, in order -> words_MX (int32).

    Of equal logits any comes first. A token below 0 (NOT_FINITE) counts as token 0. Of a row that has NaN, +inf or
    nothing but -inf the logprobs are NaN and the tokens any.
    """
    num_top = min(num_top, logits_LV.shape[1])
    parts = [scored(logits_LV.index_select(0, rows), tokens_L[rows], num_top) for rows in rows_M.split(MAX_ROWS)]
    return torch.cat(parts)


def scored(logits_MV: Tensor, tokens_M: Tensor, num_top: int) -> Tensor:
    """The same for a row of logits each."""
    logits_MV = logits_MV.float()
    tokens_M1 = tokens_M.clamp(min=0).long()[:, None]
    top_Mk = logits_MV.topk(num_top).indices
    num_likelier_M1 = (logits_MV > logits_MV.gather(1, tokens_M1)).sum(-1, keepdim=True, dtype=torch.int32)
    logprobs_MY = logits_MV.log_softmax(-1).gather(1, torch.cat([tokens_M1, top_Mk], dim=1))
    return torch.cat([logprobs_MY.view(torch.int32), num_likelier_M1, top_Mk.int()], dim=1)
