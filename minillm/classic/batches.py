"""BatchedChunkedPrefill: prompts of different lengths, in batches made by length and memory. Knows no sampling.

Shapes: n tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minillm.classic.config import check_chunk_size
from minillm.classic.model import MiniLLM, as_sequences
from minillm.runtime.kv_cache import free_memory
from minillm.types import check_int

__all__ = ["BatchedChunkedPrefill"]

MEMORY_SHARE = 0.5
"""Of what is free, for the cache and the logits of a batch."""


class BatchedChunkedPrefill:
    """Computes the logits of many sequences, those of similar length together: no padding, full passes."""

    def __init__(self, model: MiniLLM, chunk_size: int | str | None = None, max_batch_size: int = 8) -> None:
        """`chunk_size`: tokens of each sequence in a pass, or auto; None takes the config's. Raises ConfigError."""
        check_int("max_batch_size", max_batch_size, 1, 2**20)
        self.model, self.max_batch_size = model, max_batch_size
        self.chunk_size = model.settings.chunk_size if chunk_size is None else chunk_size
        check_chunk_size(self.chunk_size)

    def process_batch(
        self, sequences: Sequence[Any], use_flash_attention: bool | None = None, flash_block_size: int | None = None
    ) -> list[Tensor]:
        """Logits [n, V] of each sequence, in the order of `sequences`: tensors or lists of ids. Raises RequestError."""
        ids = as_sequences(sequences, self.model.config.vocab_size)
        attention = self.model.attention(use_flash_attention, flash_block_size)
        free, _ = free_memory(self.model.settings.place.device)
        found: dict[int, Tensor] = {}
        for batch in self.batches([len(each) for each in ids], free):
            rows = [ids[index] for index in batch]
            logits_TV = self.model.all_logits(rows, None, self.chunk_size, attention)
            found.update(zip(batch, logits_TV.split([len(row) for row in rows]), strict=True))
        return [found[index] for index in range(len(ids))]

    def batches(self, lengths: Sequence[int], free_bytes: int) -> list[list[int]]:
        """Indices of `lengths` in batches, the longest first: what is free holds a batch, or it is one sequence."""
        settings = self.model.settings
        shape, itemsize = settings.shape, settings.place.dtype.itemsize
        token_bytes = shape.kv_bytes_per_token(itemsize) + shape.vocab_size * itemsize
        max_tokens = int(MEMORY_SHARE * free_bytes) // token_bytes
        found: list[list[int]] = []
        room = 0
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            if not found or lengths[index] > room or len(found[-1]) == self.max_batch_size:
                found.append([])
                room = max_tokens
            found[-1].append(index)
            room -= lengths[index]
        return found
