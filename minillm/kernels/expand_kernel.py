"""`step_inputs.expand_step_inputs` as one Triton kernel: a program per tile of tokens and rows, one launch in all.

Shapes: T tokens, R rows, S seats, M blocks a seat can hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.step_inputs import StepInputs

__all__ = ["expand_step_inputs"]

TILE = 128


def expand_step_inputs(
    columns_5R: Tensor,
    tokens: Tensor,
    *,
    block_tables_SM: Tensor,
    last_tokens_S: Tensor,
    block_size: int,
    num_tokens: int,
) -> StepInputs:
    """`step_inputs.expand_step_inputs` in Triton; columns and tables contiguous."""
    num_rows, device = columns_5R.shape[1], columns_5R.device
    assert columns_5R.is_contiguous() and block_tables_SM.is_contiguous()
    input_ids_T = torch.empty(num_tokens, dtype=torch.int32, device=device)
    positions_T = torch.empty(num_tokens, dtype=torch.int32, device=device)
    slots_T = torch.empty(num_tokens, dtype=torch.int64, device=device)
    query_starts_R1 = torch.empty(num_rows + 1, dtype=torch.int32, device=device)
    context_lens_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    inputs = (columns_5R, tokens, block_tables_SM, last_tokens_S)
    outputs = (input_ids_T, positions_T, slots_T, query_starts_R1, context_lens_R)
    expand_kernel[(triton.cdiv(max(num_tokens, num_rows + 1), TILE),)](
        *inputs,
        *outputs,
        *(num_rows, num_tokens, block_tables_SM.shape[1], num_rows.bit_length()),
        BLOCK_SIZE=block_size,
        TILE=TILE,
        num_warps=4,
    )
    return StepInputs(
        input_ids_T=input_ids_T,
        positions_T=positions_T,
        slots_T=slots_T,
        query_starts_R1=query_starts_R1,
        context_lens_R=context_lens_R,
    )


# Sizes and the alignment of slices of a packed buffer change from step to step and must not recompile.
@triton.jit(do_not_specialize=["columns_ptr", "tokens_ptr", "num_rows", "num_tokens", "max_blocks", "num_search_steps"])
def expand_kernel(
    columns_ptr, tokens_ptr, block_tables_ptr, last_tokens_ptr,
    input_ids_ptr, positions_ptr, slots_ptr, query_starts_ptr, context_lens_ptr,
    num_rows, num_tokens, max_blocks, num_search_steps,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of rows, then a tile of tokens, each of which finds its row by bisection."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    starts_ptr, counts_ptr = columns_ptr + num_rows, columns_ptr + 2 * num_rows
    firsts_ptr, offsets_ptr = columns_ptr + 3 * num_rows, columns_ptr + 4 * num_rows

    is_row = index < num_rows
    row_end = tl.load(firsts_ptr + num_rows - 1) + tl.load(counts_ptr + num_rows - 1)
    first = tl.load(firsts_ptr + index, mask=is_row, other=0)
    tl.store(query_starts_ptr + index, tl.where(is_row, first, row_end), mask=index <= num_rows)
    context = tl.load(starts_ptr + index, mask=is_row, other=0) + tl.load(counts_ptr + index, mask=is_row, other=0)
    tl.store(context_lens_ptr + index, context, mask=is_row)

    # The last row that starts at or before the token: rows [low, high) are candidates, and low is always one.
    is_token = index < num_tokens
    low, high = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32) + num_rows
    for _ in range(num_search_steps):
        middle = (low + high) // 2
        is_before = tl.load(firsts_ptr + middle, mask=is_token & (middle < num_rows), other=0x7FFFFFFF) <= index
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    within = index - tl.load(firsts_ptr + low, mask=is_token, other=0)
    is_real = is_token & (within < tl.load(counts_ptr + low, mask=is_token, other=0))
    seat = tl.load(columns_ptr + low, mask=is_real, other=0).to(tl.int64)
    position = tl.load(starts_ptr + low, mask=is_real, other=0) + tl.where(is_real, within, 0)
    offset = tl.load(offsets_ptr + low, mask=is_real, other=-1)
    from_host = tl.load(tokens_ptr + offset + within, mask=is_real & (offset >= 0), other=0)
    from_device = tl.load(last_tokens_ptr + seat, mask=is_real & (offset < 0), other=0)
    block = tl.load(block_tables_ptr + seat * max_blocks + position // BLOCK_SIZE, mask=is_real, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(input_ids_ptr + index, from_host + from_device, mask=is_token)
    tl.store(positions_ptr + index, position, mask=is_token)
    tl.store(slots_ptr + index, tl.where(is_real, slot, 0), mask=is_token)
