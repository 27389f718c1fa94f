"""Which tokens of some sequences are computed in which forward pass, and what of the result is kept.

Every pass is the engine's own: a ForwardBatch over the paged cache. It knows no sampling.

    chunk by chunk   pass 0  | a0 a1 | b0 b1 |       side by side   pass 0  | b4 | a0 a1 | a2 a3 | b0 b1 | b2 b3 |
                     pass 1  | a2 a3 | b2 b3 |
                     pass 2  | b4 |                  (a pass begins with its parts of one token)

Shapes: T new tokens of all sequences, one sequence after the other; t tokens of a pass, L sequences with new tokens,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.classic.kv_cache import KVCache
from minillm.model.batch import ForwardBatch
from minillm.model.transformer import Transformer

__all__ = ["Part", "all_logits", "last_logits", "plan_passes"]

Attention = Callable[..., Tensor] | None


class Part(NamedTuple):
    """Tokens `start` to `end` of the new ones of a row."""

    row: int
    start: int
    end: int


def plan_passes(lengths: Sequence[int], chunk_size: int | None, *, side_by_side: bool = False) -> list[list[Part]]:
    """Passes over rows of these many new tokens, at most `chunk_size` (None: all) of a row in a part.

    >>> plan_passes([2, 3], 2)
    [[Part(row=0, start=0, end=2), Part(row=1, start=0, end=2)], [Part(row=1, start=2, end=3)]]
    """
    size = max(lengths) if chunk_size is None else chunk_size
    rounds = [
        [Part(row, at, min(at + size, length)) for row, length in enumerate(lengths) if at < length]
        for at in range(0, max(lengths), size)
    ]
    passes = [sum(rounds, [])] if side_by_side else rounds
    return [sorted(parts, key=lambda part: part.end - part.start > 1) for parts in passes]


def all_logits(
    model: Transformer, sequences: Sequence[Tensor], cache: KVCache, passes: Sequence[list[Part]], attention: Attention
) -> Tensor:
    """Logits [T, V] of every new token; `cache` gains them all."""
    offsets = [0, *accumulate(len(ids) for ids in sequences)]
    out_TV = None
    for parts, x_tD in run_passes(model, sequences, cache, passes, attention):
        tokens_t = torch.cat([torch.arange(part.start, part.end) + offsets[part.row] for part in parts])
        if len(passes) == 1 and bool((tokens_t.diff() == 1).all()):
            out_TV = model.logits(x_tD)  # in order already: no copy
            continue
        if out_TV is None:
            out_TV = x_tD.new_empty(offsets[-1], model.config.vocab_size)
        out_TV[tokens_t.to(out_TV.device)] = model.logits(x_tD)
    assert out_TV is not None
    return out_TV


def last_logits(
    model: Transformer, sequences: Sequence[Tensor], cache: KVCache, passes: Sequence[list[Part]], attention: Attention
) -> Tensor:
    """Logits [L, V] of the last token of each sequence that has any, in their order; `cache` gains all tokens."""
    found: dict[int, Tensor] = {}
    for parts, x_tD in run_passes(model, sequences, cache, passes, attention):
        ends = list(accumulate(part.end - part.start for part in parts))
        last = [
            (part.row, end - 1) for part, end in zip(parts, ends, strict=True) if part.end == len(sequences[part.row])
        ]
        if last:
            index_L = torch.tensor([at for _, at in last], device=x_tD.device)
            logits_LV = model.logits(x_tD[index_L])
            found.update(zip((row for row, _ in last), logits_LV, strict=True))
    return torch.stack([found[row] for row in sorted(found)])


def run_passes(
    model: Transformer, sequences: Sequence[Tensor], cache: KVCache, passes: Sequence[list[Part]], attention: Attention
) -> Iterator[tuple[list[Part], Tensor]]:
    """Each pass's parts with its hidden states x_tD. The cache gains the tokens at the end; a pass that fails leaves
    its lengths as they were.
    """
    counts = [len(ids) for ids in sequences] + [0] * (cache.batch_size - len(sequences))
    cache.reserve([length + count for length, count in zip(cache.lengths, counts, strict=True)])
    for parts in passes:
        yield parts, model.run_layers(forward_batch(model.ops, sequences, cache, parts, attention), cache.tensor)
    cache.advance(counts)


def forward_batch(
    ops: ModuleType, sequences: Sequence[Tensor], cache: KVCache, parts: Sequence[Part], attention: Attention
) -> ForwardBatch:
    """What a pass reads. A part is a row of the batch; parts of one sequence share its block table."""
    device = cache.tensor.device
    counts = [part.end - part.start for part in parts]
    starts = [cache.lengths[part.row] + part.start for part in parts]
    query_starts = [0, *accumulate(counts)]
    columns = [[part.row for part in parts], starts, counts, query_starts[:-1], query_starts[:-1]]
    columns_5R = torch.tensor(columns, dtype=torch.int32, device=device)
    ids_t = torch.cat([sequences[part.row][part.start : part.end] for part in parts])
    inputs = ops.expand_step_inputs(
        columns_5R,
        ids_t.to(device, torch.int32),
        block_tables_SM=cache.tables_BM,
        last_tokens_S=columns_5R.new_zeros(cache.batch_size),
        block_size=cache.block_size,
        num_tokens=query_starts[-1],
    )
    return ForwardBatch(
        input_ids_T=inputs.input_ids_T,
        positions_T=inputs.positions_T,
        slots_T=inputs.slots_T,
        query_starts_R1=inputs.query_starts_R1,
        context_lens_R=inputs.context_lens_R,
        rows_R=columns_5R[0],
        block_tables_SM=cache.tables_BM,
        num_decodes=counts.count(1),
        shares_tables=len({part.row for part in parts}) < len(parts),
        max_query_len=max(counts),
        max_context_len=max(start + count for start, count in zip(starts, counts, strict=True)),
        attention=attention,
    )
