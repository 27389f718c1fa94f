"""StoredTensor: one tensor of a checkpoint as its file holds it, dense or in blocks of a GGUF type.

It turns stored bytes into dense numbers and cuts shards; it knows neither files nor models.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minillm.errors import CheckpointError

__all__ = ["CODE_GROUP", "DENSE", "FourBit", "Shard", "StoredTensor"]

DENSE = "dense"
"""Format of a tensor whose `data` is a torch tensor of its own shape; other formats name a GGUF type."""

CODE_GROUP = 32
"""Entries of a row that share a scale and a zero: one block of Q4_0, Q4_1 or Q8_0."""
BLOCK_HEADS = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1}
"""Half-precision numbers before a block's codes: the scale, and for Q4_1 the least value."""


class FourBit(NamedTuple):
    """A matrix as 4-bit codes: entry = (code - 8) * scale + zero, with one scale and one zero per group.

    Shapes: O rows, E codes of a row, G = E / `CODE_GROUP`. E is a multiple of the matrix's columns: with twice as many
    codes the matrix is the sum of two, side by side.
    """

    codes_OE: Tensor
    """uint8, 0 to 15."""
    scales_OG: Tensor
    zeros_OG: Tensor


class Shard(NamedTuple):
    """`num` entries from `start`, out of `total` along one dimension of a stored tensor."""

    start: int
    num: int
    total: int

    @classmethod
    def whole(cls, total: int) -> Shard:
        """Everything."""
        return cls(0, total, total)

    @property
    def slice(self) -> slice:
        """As an index."""
        return slice(self.start, self.start + self.num)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A named tensor of a checkpoint, under its Hugging Face name."""

    name: str
    format: str
    """`DENSE`, or the name of a GGUF type such as Q4_1."""
    shape: tuple[int, ...]
    """Shape of the numbers (not of the blocks)."""
    data: Tensor | NDArray[np.generic]
    """Dense: a tensor of `shape`. Otherwise an array whose rows hold the blocks of the tensor's rows."""

    def dense(self, rows: Shard | None = None) -> Tensor:
        """The numbers, or those of some rows: blocks run along rows, so only these are expanded (to float32)."""
        data = self.data if rows is None or rows.num == rows.total else self.data[rows.slice]
        if isinstance(data, Tensor):
            return data
        # gguf imports slowly, and folders of safetensors do not need it.
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            numbers = dequantize(data, GGMLQuantizationType[self.format])
        except NotImplementedError as error:
            raise CheckpointError(
                f"tensor {self.name} has type {self.format}, which cannot be expanded; take a file of the model in "
                "another type, such as F16, Q8_0 or Q4_K"
            ) from error
        with warnings.catch_warnings():
            # A float32 tensor stays a view of the read-only file: it is only ever copied from.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(numbers).view(-1, *self.shape[1:])

    def four_bit(self, rows: Shard | None = None) -> FourBit | None:
        """The stored codes, or those of some rows, without loss; None for a type that has none.

        Q4_0 and Q4_1 are pairs of codes, entries 0 to 15 of a block in the low halves and 16 to 31 in the high halves.
        An entry v of Q8_0 is 16 times its high half plus its low half: two codes.
        """
        num_heads = BLOCK_HEADS.get(self.format)
        if num_heads is None:
            return None
        assert isinstance(self.data, np.ndarray)
        stored = self.data if rows is None else self.data[rows.slice]
        num_rows, num_groups = stored.shape[0], self.shape[-1] // CODE_GROUP
        blocks = np.ascontiguousarray(stored).view(np.uint8).reshape(num_rows, num_groups, -1)
        heads_OGX = torch.from_numpy(blocks[..., : 2 * num_heads].copy().view(np.float16)).float()
        halves_OGX = torch.from_numpy(blocks[..., 2 * num_heads :].copy())
        low_OGX, high_OGX = halves_OGX & 15, halves_OGX >> 4
        scales_OG = heads_OGX[..., 0]
        if self.format == "Q8_0":
            codes = torch.stack((high_OGX ^ 8, low_OGX), dim=1)  # the high half has a sign
            scales, zeros = (16 * scales_OG, scales_OG), (torch.zeros_like(scales_OG), 8 * scales_OG)
            return FourBit(codes.view(num_rows, -1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1))
        zeros_OG = heads_OGX[..., 1] + 8 * scales_OG if num_heads == 2 else torch.zeros_like(scales_OG)
        return FourBit(torch.cat((low_OGX, high_OGX), dim=-1).view(num_rows, -1), scales_OG, zeros_OG)
