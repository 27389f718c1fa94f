"""Runs a Transformer over token sequences through a paged cache with shuffled block tables: a tool for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.model.batch import ForwardBatch
from minillm.model.transformer import Transformer

BLOCK_SIZE = 16


class PagedRun:
    """Sequences of tokens in one cache; `step` computes the next few tokens of some of them in one forward pass."""

    def __init__(self, model: Transformer, sequences: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.model, self.sequences = model, sequences
        self.done = [0] * len(sequences)
        num_each = max(-(-len(s) // BLOCK_SIZE) for s in sequences)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(num_each * len(sequences), generator=generator) + 1
        self.tables_SM = torch.zeros(len(sequences) + 1, num_each, dtype=torch.int32)
        self.tables_SM[1:] = order.view(len(sequences), num_each).int()
        config = model.config
        num_kv_heads = max(1, config.num_kv_heads // model.tp.size)
        shape = (config.num_layers, 2, len(order) + 1, num_kv_heads, BLOCK_SIZE, config.head_size)
        self.kv_cache = torch.full(shape, 1e4, dtype=model.norm.weight.dtype)  # poison: nothing unwritten may be read

    def batch(self, counts: Sequence[int]) -> tuple[list[int], ForwardBatch]:
        """The sequences in the next pass in their order there, and what it reads; logits of every token."""
        rows = sorted((i for i, count in enumerate(counts) if count), key=lambda i: counts[i] > 1)
        ids, positions, slots, starts = [], [], [], [0]
        for i in rows:
            for position in range(self.done[i], self.done[i] + counts[i]):
                block = int(self.tables_SM[i + 1, position // BLOCK_SIZE])
                ids.append(self.sequences[i][position])
                positions.append(position)
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            self.done[i] += counts[i]
            starts.append(len(ids))
        context_lens = [self.done[i] for i in rows]
        batch = ForwardBatch(
            input_ids_T=torch.tensor(ids, dtype=torch.int32),
            positions_T=torch.tensor(positions, dtype=torch.int32),
            slots_T=torch.tensor(slots),
            query_starts_R1=torch.tensor(starts, dtype=torch.int32),
            context_lens_R=torch.tensor(context_lens, dtype=torch.int32),
            rows_R=torch.tensor([i + 1 for i in rows], dtype=torch.int32),
            block_tables_SM=self.tables_SM,
            num_decodes=sum(counts[i] == 1 for i in rows),
            max_query_len=max(counts),
            max_context_len=max(context_lens),
        )
        return rows, batch

    def step(self, counts: Sequence[int]) -> list[Tensor]:
        """Logits [count, V] of the next `counts[i]` tokens of sequence i (0: left out)."""
        rows, batch = self.batch(counts)
        with torch.inference_mode():
            logits_TV = self.model(batch, self.kv_cache, torch.arange(batch.input_ids_T.shape[0]))
        parts = dict(zip(rows, logits_TV.split([counts[i] for i in rows]), strict=True))
        return [parts.get(i, logits_TV[:0]) for i in range(len(counts))]

    def run(self, steps: Sequence[Sequence[int]]) -> list[Tensor]:
        """Several steps; logits [length, V] of each sequence."""
        outs = [self.step(counts) for counts in steps]
        return [torch.cat([out[i] for out in outs]) for i in range(len(self.sequences))]
