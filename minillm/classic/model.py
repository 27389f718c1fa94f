"""MiniLLM: token ids in, logits of every token out, over the engine's decoder, kernels and paged cache.

It knows no text and no sampling.

Shapes: B sequences, S tokens of each; T new tokens of all sequences, one sequence after the other, L sequences with
new tokens; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from minillm.classic.chunk_size import auto_chunk_size
from minillm.classic.config import AUTO, ModelConfig, check_chunk_size
from minillm.classic.kv_cache import KVCache
from minillm.classic.passes import Attention, Part, all_logits, last_logits, plan_passes
from minillm.errors import RequestError
from minillm.kernels import reference
from minillm.model.rotary import rotary_table
from minillm.model.transformer import Transformer
from minillm.model.weights import fill_random
from minillm.runtime.kv_cache import free_memory
from minillm.types import as_int, shown

__all__ = ["ChunkedPrefillMiniLLM", "MiniLLM", "as_sequences"]

ChunkSize = int | str | None


class MiniLLM(nn.Module):
    """A decoder of the Llama family with the weights that `load` gives, random ones by default."""

    def __init__(
        self, config: ModelConfig, *, seed: int = 0, load: Callable[[Transformer], None] | None = None
    ) -> None:
        """`load` fills the model's weights, as the functions of `minillm/model/weights.py` do; None draws them.

        Raises ConfigError.
        """
        super().__init__()
        self.settings = config.freeze()
        self.config, place = self.settings.shape, self.settings.place
        self.transformer = Transformer(self.config, ops=place.ops, dtype=place.dtype, device=place.device)
        (partial(fill_random, seed=seed) if load is None else load)(self.transformer)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | None = None,
        use_flash_attention: bool | None = None,
        flash_block_size: int | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of `input_ids` [B, S], in one pass.

        `kv_cache` holds what came before; its first B rows gain the new tokens. `use_flash_attention`: None takes the
        config's. `flash_block_size`: the tile of Flash Attention (keys on a GPU, queries on a CPU), a power of two from
        16; None takes what was measured best. Raises RequestError.
        """
        attention = self.attention(use_flash_attention, flash_block_size)
        return self.batch_logits(input_ids, kv_cache, None, attention)

    def attention(self, use_flash_attention: bool | None, flash_block_size: int | None) -> Attention:
        """What attends in a pass: None for the kernel set's own Flash Attention. Raises RequestError."""
        is_flash = self.settings.use_flash_attention if use_flash_attention is None else use_flash_attention
        if flash_block_size is not None and as_int(flash_block_size) is None:
            raise RequestError(f"flash_block_size must be an integer, not {shown(flash_block_size)}")
        if not is_flash:
            return standard_attention
        if flash_block_size is None:
            return None
        return partial(tiled_attention, self.settings.place.ops, flash_block_size)

    def batch_logits(
        self, input_ids: Tensor, kv_cache: KVCache | None, chunk_size: ChunkSize, attention: Attention
    ) -> Tensor:
        """Logits [B, S, V], `chunk_size` tokens of each sequence in a pass."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise RequestError("input_ids must be a tensor [batch, tokens]: use unsqueeze(0) for one sequence")
        sequences = as_sequences(input_ids, self.config.vocab_size)
        return self.all_logits(sequences, kv_cache, chunk_size, attention).view(*input_ids.shape, -1)

    @torch.no_grad()
    def all_logits(
        self, sequences: Sequence[Tensor], cache: KVCache | None, chunk_size: ChunkSize, attention: Attention
    ) -> Tensor:
        """Logits [T, V] of every token of `sequences`, which are rows of `cache`; None makes one that is dropped."""
        if cache is None:
            cache = self.make_cache(max(map(len, sequences)), len(sequences))
        passes = self._passes(sequences, cache, chunk_size)
        return all_logits(self.transformer, sequences, cache, passes, attention)

    @torch.no_grad()
    def last_logits(
        self, sequences: Sequence[Tensor], cache: KVCache, chunk_size: ChunkSize, attention: Attention
    ) -> Tensor:
        """Logits [L, V] of the last tokens of those `sequences` that have any; the head computes no others."""
        passes = self._passes(sequences, cache, chunk_size)
        return last_logits(self.transformer, sequences, cache, passes, attention)

    def make_cache(self, length: int, batch_size: int) -> KVCache:
        """A cache for sequences of up to `length` tokens. Raises RequestError if the model has fewer positions."""
        if length > self.config.max_position:
            raise RequestError(
                f"a sequence comes to {length} tokens and the model has {self.config.max_position} positions: shorten "
                "it, or give a KVCache with a larger max_length"
            )
        return KVCache(self.settings, batch_size=batch_size, max_length=length)

    def _passes(self, sequences: Sequence[Tensor], cache: KVCache, chunk_size: ChunkSize) -> list[list[Part]]:
        if len(sequences) > cache.batch_size:
            raise RequestError(
                f"{len(sequences)} sequences and a KVCache of batch_size {cache.batch_size}: make it larger"
            )
        settings, lengths = self.settings, [len(ids) for ids in sequences]
        cache.check_fits(settings)
        if chunk_size is not None:
            check_chunk_size(chunk_size)
        self._reach(max(map(sum, zip(cache.lengths, lengths, strict=False))), cache.max_length)
        if chunk_size == AUTO:
            free, _ = free_memory(settings.place.device)
            chunk_size = auto_chunk_size(settings, len(sequences), free)
        if not settings.enable_chunked_prefill:
            chunk_size = None
        assert not isinstance(chunk_size, str)
        return plan_passes(lengths, chunk_size, side_by_side=not settings.memory_efficient)

    def _reach(self, length: int, max_length: int) -> None:
        """Let the rotary table reach `length` positions: a cache may be longer than what the model was made for."""
        table_EH = self.transformer.cos_sin_EH
        if table_EH.shape[0] < length <= max_length:
            num_positions = min(2 * length, max_length)
            self.transformer.cos_sin_EH = rotary_table(self.config, num_positions, table_EH.device)


class ChunkedPrefillMiniLLM(MiniLLM):
    """A MiniLLM that can compute a prompt in chunks, with the same logits."""

    def __init__(self, config: ModelConfig, chunk_size: int | str | None = None, **options: Any) -> None:
        """`chunk_size`: tokens of each sequence in a pass, or auto; None takes the config's. `options` as in MiniLLM.

        Raises ConfigError.
        """
        chunk_size = config.chunk_size if chunk_size is None else chunk_size
        check_chunk_size(chunk_size)
        super().__init__(config, **options)
        self.chunk_size = chunk_size

    def chunked_prefill_forward(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | None = None,
        use_flash_attention: bool | None = None,
        flash_block_size: int | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of every token, computed in chunks; otherwise as `forward`."""
        attention = self.attention(use_flash_attention, flash_block_size)
        return self.batch_logits(input_ids, kv_cache, self.chunk_size, attention)


def standard_attention(q_TNH: Tensor, *, prepared: object = None, **inputs: Any) -> Tensor:
    """The oracle's attention, which holds all scores; it needs nothing that a kernel set has prepared."""
    return reference.attention(q_TNH, **inputs)


def tiled_attention(ops: ModuleType, flash_block_size: int, q_TNH: Tensor, **inputs: Any) -> Tensor:
    """The kernel set's Flash Attention with this tile, for rows of any number of queries."""
    try:
        out_TNH: Tensor = ops.attention(q_TNH, block_tokens=flash_block_size, one_launch=True, **inputs)
    except ValueError as error:
        raise RequestError(str(error).replace("block_tokens", "flash_block_size")) from error
    return out_TNH


def as_sequences(input_ids: Tensor | Sequence[Any], vocab_size: int) -> list[Tensor]:
    """One int64 tensor per sequence, from a tensor [B, S] or a list of tensors or lists of ids.

    Raises RequestError for anything else, an empty sequence, or ids outside the vocabulary.
    """
    try:
        sequences = [torch.as_tensor(ids) for ids in input_ids]
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"input_ids must be a tensor [batch, tokens] or a list of sequences: {error}") from error
    if not sequences:
        raise RequestError("input_ids holds no sequence: give at least one")
    for index, ids in enumerate(sequences):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise RequestError(f"sequence {index} must be a list of token ids, not {ids.dtype} of {list(ids.shape)}")
        sequences[index] = ids = ids.long()  # small types have no room for other tokens, unsigned ones few operations
        if not len(ids):
            raise RequestError(f"sequence {index} is empty: give at least one token")
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise RequestError(
                f"sequence {index} has a token outside the vocabulary: ids are from 0 to {vocab_size - 1}"
            )
    return sequences
