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

__all__ = ["DENSE", "Shard", "StoredTensor"]

DENSE = "dense"
"""Format of a tensor whose `data` is a torch tensor of its own shape; other formats name a GGUF type."""


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
            raise CheckpointError(f"tensor {self.name} has type {self.format}, which cannot be expanded") from error
        with warnings.catch_warnings():
            # A float32 tensor stays a view of the read-only file: it is only ever copied from.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(numbers).view(-1, *self.shape[1:])
