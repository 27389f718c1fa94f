"""KVCache: the engine's paged cache behind the interface of the classic documents and of transformers' caches.

Rows have lengths of their own and take blocks as they grow. It knows tensors, not models.

    row 0  | block 0 | block 2 | block 5 ..       blocks are handed out in the order in which rows reach them,
    row 1  | block 1 | block 3 | block 4 ..       so memory follows the sum of the lengths

Shapes: B rows, M blocks that a row can hold, S new tokens, E tokens of the longest row, K key/value heads, H head size,
P block size, n tokens of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.classic.config import ModelConfig, Settings
from minillm.errors import RequestError
from minillm.runtime.kv_cache import make_kv_cache
from minillm.types import check_int

__all__ = ["KVCache"]

BLOCK_SIZE = 16
MAX_LENGTH = 2**24


class KVCache:
    """Keys and values of `batch_size` sequences, for `model(input_ids, kv_cache=cache)` or as `past_key_values`."""

    is_compileable = False  # what transformers asks of a cache, see the end of the class

    def __init__(self, config: ModelConfig | Settings, batch_size: int = 1, max_length: int | None = None) -> None:
        """`max_length`: most tokens of a row, also more than the model's positions; None takes those.

        Raises RequestError, ConfigError.
        """
        check_int("batch_size", batch_size, 1, 2**20)
        settings = config if isinstance(config, Settings) else config.freeze()
        self._shape, self._place = settings.shape, settings.place
        self.max_length = self._shape.max_position if max_length is None else max_length
        check_int("max_length", self.max_length, 1, MAX_LENGTH)
        self.batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        num_blocks = -(-self.max_length // BLOCK_SIZE)
        self.tables_BM = torch.zeros(self.batch_size, num_blocks, dtype=torch.int32, device=self._place.device)
        self.tensor = self._make(1)
        self._num_blocks = [0] * self.batch_size
        # A layer at a time is `update`d, so each has its lengths.
        self._lengths = [[0] * self.batch_size for _ in range(self._shape.num_layers)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(self._lengths[0])

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return BLOCK_SIZE

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self.tensor.numel() * self.tensor.element_size()

    def check_fits(self, settings: Settings) -> None:
        """Raise RequestError unless a model of these settings can use this cache."""
        ours, theirs = (
            (shape.num_layers, shape.num_kv_heads, shape.head_size, place.dtype, place.device.type)
            for shape, place in ((self._shape, self._place), (settings.shape, settings.place))
        )
        if ours != theirs:
            raise RequestError(
                f"the KVCache is for {shown_kind(ours)} and the model has {shown_kind(theirs)}: make it of the model's "
                "config"
            )

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for rows of these lengths.

        Raises RequestError if one is beyond `max_length`; then nothing has changed.
        """
        if max(lengths) > self.max_length:
            raise RequestError(
                f"row {lengths.index(max(lengths))} would hold {max(lengths)} tokens and the cache's max_length is "
                f"{self.max_length}: shorten it, or make a KVCache with a larger max_length"
            )
        wanted = [max(had, -(-length // BLOCK_SIZE)) for had, length in zip(self._num_blocks, lengths, strict=True)]
        used, needed = sum(self._num_blocks), sum(wanted)
        if needed > self.tensor.shape[2]:
            most = self.batch_size * self.tables_BM.shape[1]
            grown = self._make(max(needed, min(2 * self.tensor.shape[2], most)))
            grown[:, :, :used] = self.tensor[:, :, :used]
            self.tensor = grown
        for row, (had, num) in enumerate(zip(self._num_blocks, wanted, strict=True)):
            self.tables_BM[row, had:num] = torch.arange(used, used + num - had, device=self.tables_BM.device)
            used += num - had
        self._num_blocks = wanted

    def advance(self, counts: Sequence[int]) -> None:
        """Note that all layers hold `counts[row]` more tokens of each row, which were `reserve`d and written."""
        for lengths in self._lengths:
            lengths[:] = [length + count for length, count in zip(lengths, counts, strict=True)]

    @torch.no_grad()
    def update(
        self, key: Tensor, value: Tensor, layer: int, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer; all that it holds then, two tensors [B, K, E, H], zero beyond a row's length.

        `key`, `value`: [B, K, S, H], rotated as attention wants them. `counts`: how many of the S tokens are each
        row's; None: all. Raises RequestError.
        """
        self._check(key, value, layer)
        num_new = key.shape[2]
        added = [num_new] * self.batch_size if counts is None else list(counts)
        if len(added) != self.batch_size or not all(0 <= count <= num_new for count in added):
            raise RequestError(f"counts must be {self.batch_size} integers from 0 to {num_new}, not {counts}")
        lengths = self._lengths[layer]
        ends = [length + count for length, count in zip(lengths, added, strict=True)]
        self.reserve(ends)
        kv_2BKPH = self.tensor[layer]
        for row, (start, end) in enumerate(zip(lengths, ends, strict=True)):
            positions_n = torch.arange(start, end, device=self.tensor.device)
            blocks_n = self.tables_BM[row].long()[positions_n // BLOCK_SIZE]
            for kept, new in zip(kv_2BKPH, (key, value), strict=True):
                kept[blocks_n, :, positions_n % BLOCK_SIZE] = new[row, :, : end - start].transpose(0, 1)
        lengths[:] = ends
        return self._read(layer)

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor(self._lengths[layer], device=self.tensor.device)
        longest = max(self._lengths[layer])
        tables_BM = self.tables_BM[:, : -(-longest // BLOCK_SIZE)].long()
        is_held_BE = torch.arange(longest, device=lengths.device) < lengths[:, None]
        kv_2BMKPH = self.tensor[layer][:, tables_BM]
        kv_2BKEH = kv_2BMKPH.transpose(2, 3).flatten(3, 4)[:, :, :, :longest]
        keys_BKEH, values_BKEH = kv_2BKEH.masked_fill(~is_held_BE[None, :, None, :, None], 0)
        return keys_BKEH, values_BKEH

    def _check(self, key: Tensor, value: Tensor, layer: int) -> None:
        check_int("layer", layer, 0, self._shape.num_layers - 1)
        wanted = (self.batch_size, self._shape.num_kv_heads, self._shape.head_size)
        for name, new in (("key", key), ("value", value)):
            if new.dim() != 4 or (new.shape[0], new.shape[1], new.shape[3]) != wanted or new.shape != key.shape:
                raise RequestError(
                    f"{name} must be [{wanted[0]}, {wanted[1]}, tokens, {wanted[2]}], as many for both, not "
                    f"{list(new.shape)}"
                )
            if new.dtype != self._place.dtype or new.device.type != self._place.device.type:
                raise RequestError(
                    f"{name} is {new.dtype} on {new.device} and the cache {self._place.dtype} on {self._place.device}: "
                    "give the cache's config the model's dtype and device"
                )

    def _make(self, num_blocks: int) -> Tensor:
        return make_kv_cache(self._shape, num_blocks, BLOCK_SIZE, self._place.dtype, self._place.device)

    def _seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return max(self._lengths[layer_idx])

    def _mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that queries to come will see, and the first one's position."""
        return self._seq_length(layer_idx) + query_length, 0

    # Names of transformers.cache_utils.Cache.
    get_seq_length = get_query_offset = _seq_length
    get_mask_sizes = _mask_sizes


def shown_kind(kind: tuple[object, ...]) -> str:
    """Layers, heads, head size, dtype and device as an error says them."""
    return "{} layers of {} key/value heads of {} in {} on {}".format(*kind)
