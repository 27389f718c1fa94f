"""From a step's packed words to a model's inputs, on the device: per-row columns become per-token tensors.

In plain torch here, for a CPU and as the oracle; `expand_kernel` does the same in one launch of a Triton kernel.
It knows columns and tables, not plans. Shapes: T tokens, R rows, S seats, M blocks a seat can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StepInputs", "expand_step_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a forward pass reads, beside the columns themselves (rows_R is the first of them)."""

    input_ids_T: Tensor
    """int32."""
    positions_T: Tensor
    """int32."""
    slots_T: Tensor
    """int64: block * block_size + offset."""
    query_starts_R1: Tensor
    """int32 [R + 1]."""
    context_lens_R: Tensor
    """int32: start + count."""


def expand_step_inputs(
    columns_5R: Tensor,
    tokens: Tensor,
    *,
    block_tables_SM: Tensor,
    last_tokens_S: Tensor,
    block_size: int,
    num_tokens: int,
) -> StepInputs:
    """Expand int32 columns (seat, start, count, query start, offset into `tokens` or -1) to `num_tokens` tokens.

        row 0   seat 7, start 90, count 1, query start 0, offset -1  ->  token last_tokens_S[7]  at position 90
        row 1   seat 2, start 16, count 3, query start 1, offset  0  ->  tokens[0], [1], [2]     at 16, 17, 18

    Rows lie in the order of their query starts and without gaps; a row may be empty. Tokens beyond the last row are
    padding: id 0, position 0, slot 0. Padding by rows of seat 0, whose table holds block 0 alone, does as well. Shapes
    depend on R and `num_tokens` alone, so a CUDA graph can hold the call.
    """
    _, starts_R, counts_R, query_starts_R, _ = columns_5R
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=columns_5R.device)
    row_T = torch.searchsorted(query_starts_R, token_T, right=True, out_int32=True) - 1
    seat_T, start_T, count_T, query_start_T, offset_T = columns_5R[:, row_T]
    within_T = token_T - query_start_T
    is_padding_T = within_T >= count_T
    seat_T = seat_T.masked_fill(is_padding_T, 0)
    positions_T = (start_T + within_T).masked_fill_(is_padding_T, 0)
    input_ids_T = last_tokens_S[seat_T]
    if tokens.numel():
        from_host_T = tokens[(offset_T + within_T).clamp_(0, tokens.numel() - 1)]
        input_ids_T = torch.where(offset_T >= 0, from_host_T, input_ids_T)
    blocks_T = block_tables_SM[seat_T, positions_T // block_size]
    slots_T = blocks_T.long() * block_size + positions_T % block_size
    return StepInputs(
        input_ids_T=input_ids_T.masked_fill_(is_padding_T, 0),
        positions_T=positions_T,
        slots_T=slots_T.masked_fill_(is_padding_T, 0),
        query_starts_R1=torch.cat((query_starts_R, query_starts_R[-1:] + counts_R[-1:])),
        context_lens_R=starts_R + counts_R,
    )
