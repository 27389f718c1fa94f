"""Linear layers and embeddings that hold one rank's share of a tensor-parallel model, and load it themselves.

A rank is data (`TPGroup`), not process state, so any rank can be built anywhere. With size 1 every shard is the whole.
Column shards split outputs (no communication), row shards split inputs (sums must be added up over ranks).

Shapes: T tokens, D inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillm.errors import CheckpointError, ConfigError
from minillm.model.stored import FourBit, Shard, StoredTensor

__all__ = ["Build", "Embedding", "Linear", "TPGroup", "Target", "Vector", "VocabHead"]


def unchanged(x: Tensor) -> Tensor:
    """What a collective does in a group of one."""
    return x


@dataclass(frozen=True, slots=True)
class TPGroup:
    """One rank's place among `size`, and the two collectives that a model needs."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = unchanged
    """Sum over ranks, the same on each."""
    all_gather: Callable[[Tensor], Tensor] = unchanged
    """Concatenation over ranks along the last dimension, the same on each."""

    def shard(self, total: int, what: str) -> Shard:
        """This rank's equal share. Raises ConfigError if `total` cannot be split evenly."""
        if total % self.size:
            raise ConfigError(f"{what} {total} cannot be split over {self.size} ranks; use a divisor of {total}")
        num = total // self.size
        return Shard(self.rank * num, num, total)

    def head_shard(self, num_heads: int) -> Shard:
        """This rank's key/value heads: an equal share, or one head that several ranks hold alike."""
        if num_heads >= self.size:
            return self.shard(num_heads, "num_kv_heads")
        if self.size % num_heads:
            raise ConfigError(f"{self.size} ranks cannot share {num_heads} key/value heads evenly")
        return Shard(self.rank * num_heads // self.size, 1, num_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What every layer needs to be built: the kernel set, where its weights live, and this rank's place."""

    ops: ModuleType
    dtype: torch.dtype
    device: torch.device
    tp: TPGroup = field(default_factory=TPGroup)
    keeps_codes: bool = False
    """Whether matrices also keep the 4-bit codes of their file for the kernel set (one rank only)."""

    def codes(self, stored: StoredTensor, rows: Shard) -> FourBit | None:
        """The codes of some rows of a matrix, if they are to be kept and there are any."""
        return stored.four_bit(rows) if self.keeps_codes and self.tp.size == 1 else None

    def weight(self, *shape: int) -> nn.Parameter:
        """An uninitialised weight; every entry is loaded before use."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)


class Target(NamedTuple):
    """Where a stored tensor belongs: the shape it must have, and what takes it in."""

    shape: tuple[int, ...]
    load: Callable[[StoredTensor], None]

    def take(self, stored: StoredTensor) -> None:
        """Load a tensor. Raises CheckpointError if its shape does not fit."""
        if stored.shape != self.shape:
            raise CheckpointError(
                f"tensor {stored.name} has shape {list(stored.shape)} and the config asks for {list(self.shape)}; "
                "the weights and the config are of different models"
            )
        self.load(stored)


class Vector(nn.Module):
    """A weight of one dimension that every rank holds whole (a norm's)."""

    def __init__(self, build: Build, size: int) -> None:
        super().__init__()
        self.weight = build.weight(size)

    def targets(self, name: str) -> Iterator[tuple[str, Target]]:
        """(name in a checkpoint, target)."""
        yield f"{name}.weight", Target(tuple(self.weight.shape), self._load)

    def _load(self, stored: StoredTensor) -> None:
        self.weight.copy_(stored.dense())


class Linear(nn.Module):
    """y = x W^T + b, whose weight stacks the rows of one or more stored tensors (q, k and v; gate and up)."""

    def __init__(self, build: Build, columns: Shard, parts: Mapping[str, Shard], *, bias: bool = False) -> None:
        """`parts`: which rows of each stored tensor this rank holds, in the order in which they are stacked."""
        super().__init__()
        num_outputs = sum(rows.num for rows in parts.values())
        self.build, self.ops, self.tp = build, build.ops, build.tp
        self.columns, self.parts = columns, dict(parts)
        self.is_partial = columns.num < columns.total
        self.weight = build.weight(num_outputs, columns.num)
        self.bias = build.weight(num_outputs) if bias else None
        self._codes: dict[int, FourBit | None] = {}
        self._packed: Any = None

    def forward(self, x_TD: Tensor) -> Tensor:
        """x_TD -> y_TO: this rank's outputs, or for row shards the sum over ranks."""
        # The bias of a sum is added once.
        bias_O = None if self.is_partial and self.tp.rank else self.bias
        y_TO: Tensor = self.ops.linear(x_TD, self.weight if self._packed is None else self._packed, bias_O)
        return self.tp.all_reduce(y_TO) if self.is_partial else y_TO

    def into(self, residual_TO: Tensor, x_TD: Tensor) -> Tensor | None:
        """residual += `forward` in place and None, or what is still to be added: y_TO, or parts of it [S, T, O]."""
        if self.is_partial or not hasattr(self.ops, "linear_into"):
            return self.forward(x_TD)  # a module's call costs as much as a small product's launch
        rest: Tensor | None = self.ops.linear_into(residual_TO, x_TD, self.weight, self.bias)
        return rest

    def gated(self, x_TD: Tensor) -> Tensor:
        """silu(first half) * second half of the outputs -> [T, O / 2]."""
        y_TF: Tensor = self.ops.gated_linear(x_TD, self.weight if self._packed is None else self._packed, self.bias)
        return y_TF

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        """(name in a checkpoint, target) of each part's weight and bias."""
        at = 0
        for part, rows in self.parts.items():
            here = slice(at, at + rows.num)
            at += rows.num
            yield f"{prefix}{part}.weight", Target((rows.total, self.columns.total), self._weight_loader(here, rows))
            if self.bias is not None:
                yield f"{prefix}{part}.bias", Target((rows.total,), self._bias_loader(here, rows))

    def finish_loading(self) -> None:
        """Let the kernel set lay the weight out anew, if it wants to."""
        pack = getattr(self.ops, "pack_linear", None)
        if pack is not None:
            self._packed = pack(self.weight.data, stacked([self._codes[at] for at in sorted(self._codes)]))
            del self.weight
        self._codes.clear()

    def _weight_loader(self, here: slice, rows: Shard) -> Callable[[StoredTensor], None]:
        def load(stored: StoredTensor) -> None:
            self.weight[here].copy_(stored.dense(rows)[:, self.columns.slice])
            self._codes[here.start] = self.build.codes(stored, rows)

        return load

    def _bias_loader(self, here: slice, rows: Shard) -> Callable[[StoredTensor], None]:
        def load(stored: StoredTensor) -> None:
            assert self.bias is not None
            self.bias[here].copy_(stored.dense(rows))

        return load


def stacked(parts: list[FourBit | None]) -> FourBit | None:
    """The codes of matrices on top of each other, if all have them, as many in a row."""
    found = [part for part in parts if part is not None]
    if not parts or len(found) < len(parts) or len({part.codes_OE.shape[1] for part in found}) > 1:
        return None
    return FourBit(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))


class Embedding(nn.Module):
    """Token id -> vector. A rank holds a run of the vocabulary, padded with zeros to equal runs."""

    def __init__(self, build: Build, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.build, self.tp, self.vocab_size = build, build.tp, vocab_size
        num_rows = -(-vocab_size // build.tp.size)
        start = min(build.tp.rank * num_rows, vocab_size)
        self.rows = Shard(start, min(num_rows, vocab_size - start), vocab_size)
        self.weight = build.weight(num_rows, hidden_size)
        self.codes: FourBit | None = None

    def forward(self, ids_T: Tensor) -> Tensor:
        """int ids_T -> x_TD: a fresh tensor."""
        if self.tp.size == 1:
            return nn.functional.embedding(ids_T, self.weight)
        local_T = ids_T - self.rows.start
        is_here_T = (local_T >= 0) & (local_T < self.rows.num)
        x_TD = nn.functional.embedding(local_T.clamp(0, self.weight.shape[0] - 1), self.weight)
        return self.tp.all_reduce(x_TD * is_here_T[:, None])

    def targets(self, name: str) -> Iterator[tuple[str, Target]]:
        """(name in a checkpoint, target)."""
        yield f"{name}.weight", Target((self.vocab_size, self.weight.shape[1]), self._load)

    def _load(self, stored: StoredTensor) -> None:
        self.weight[: self.rows.num].copy_(stored.dense(self.rows))
        self.weight[self.rows.num :].zero_()
        self.codes = self.build.codes(stored, self.rows)


class VocabHead(nn.Module):
    """Hidden state -> logits of the whole vocabulary; its weight is a tied embedding's or its own."""

    def __init__(self, build: Build, embedding: Embedding, *, is_tied: bool) -> None:
        super().__init__()
        self.ops, self.tp, self.vocab_size = build.ops, build.tp, embedding.vocab_size
        self.is_tied = is_tied
        self.table = embedding if is_tied else Embedding(build, *self._shape(embedding))
        self._packed: Any = None

    def forward(self, hidden_LD: Tensor) -> Tensor:
        """hidden_LD -> logits_LV in the model's dtype, the same on every rank."""
        weight = self.table.weight if self._packed is None else self._packed
        logits_LV = self.tp.all_gather(self.ops.linear(hidden_LD, weight, None))
        return logits_LV[:, : self.vocab_size]

    def finish_loading(self) -> None:
        """Let the kernel set lay the weight out anew; a tied embedding keeps its own copy for look-ups."""
        pack = getattr(self.ops, "pack_linear", None)
        if pack is None:
            return
        self._packed = pack(self.table.weight.data, self.table.codes)
        self.table.codes = None
        if not self.is_tied:
            del self.table.weight

    @staticmethod
    def _shape(embedding: Embedding) -> tuple[int, int]:
        return embedding.vocab_size, embedding.weight.shape[1]
