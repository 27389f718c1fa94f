"""One pass of an engine's own model over a text, with logits at every position: a tool for tests."""

from __future__ import annotations

import torch

from minillm import LLM
from minillm.model.batch import ForwardBatch


def forward_logits(llm: LLM, ids: list[int]) -> torch.Tensor:
    """fp32 logits [len(ids), V] of every position, in a cache of their own."""
    model, ops = llm._runner.model, llm._runner
    block_size = ops.block_size
    num_blocks = -(-len(ids) // block_size) + 1
    shape = list(ops.kv_cache.shape)
    shape[2] = num_blocks
    device = ops.kv_cache.device
    kv_cache = torch.zeros(shape, dtype=ops.kv_cache.dtype, device=device)
    positions = torch.arange(len(ids), dtype=torch.int32, device=device)
    ints = {"dtype": torch.int32, "device": device}
    is_single = len(ids) == 1
    batch = ForwardBatch(
        input_ids_T=torch.tensor(ids, **ints),
        positions_T=positions,
        slots_T=positions.long() + block_size,
        query_starts_R1=torch.tensor([0, len(ids)], **ints),
        context_lens_R=torch.tensor([len(ids)], **ints),
        rows_R=torch.zeros(1, **ints),
        block_tables_SM=torch.arange(1, num_blocks, **ints)[None],
        num_decodes=int(is_single),
        max_query_len=len(ids),
        max_context_len=len(ids),
    )
    with torch.inference_mode():
        logits: torch.Tensor = model(batch, kv_cache, torch.arange(len(ids), device=device))
    return logits.float()
