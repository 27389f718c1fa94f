"""Device state of running requests: one row (seat) each, changed only by the deltas of plans.

It knows no requests, only seats: block tables, sampling parameters and the last sampled token. Row 0 is a dummy
that padding points at; its table leads to block 0, which no request owns.

Shapes: S seats (row 0 included), M blocks a seat can hold.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minillm.core.plan import RowParams, StepPlan

Ints = NDArray[np.int32]

# Columns of a row's parameters, as 32-bit words: temperature, top_k, top_p, min_p, seed (low word, high word).
NUM_PARAM_WORDS = 6
RANDOM, FILTERED = 1, 2
"""Ways of sampling; a filtered row is random."""
NO_DELTAS: tuple[Ints, ...] = (np.zeros(0, np.int32),) * 6


class Rows:
    """Resident tensors by seat. `delta_words` turns a plan's deltas into words to be scattered."""

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.max_blocks = max_blocks
        self.block_tables_SM = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self.last_tokens_S = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.params_4S = torch.zeros(4, num_rows, dtype=torch.int32, device=device)
        self.seeds_S = torch.zeros(num_rows, dtype=torch.int64, device=device)
        # The host's copy of what decides which kernels run: 0, RANDOM or FILTERED.
        self.kinds = [0] * num_rows

    def delta_words(self, plan: StepPlan) -> tuple[Ints, ...]:
        """What the plan changes, for `scatter` and the cache, and a note of its new seats on the host.

        Flat int32 arrays: places in the block tables, what goes there, seated rows, their parameters, blocks to copy
        from, and to.
        """
        if not (plan.seats or plan.blocks or plan.copies):
            return NO_DELTAS
        copies = np.frombuffer(plan.copies, np.int32)
        return *self._block_words(plan), *self._seat(plan), copies[::2], copies[1::2]

    def _seat(self, plan: StepPlan) -> tuple[Ints, Ints]:
        """Note the plan's new seats on the host; return their rows [n] and parameter words [6 n]."""
        rows = np.fromiter((s.row for s in plan.seats), np.int32, len(plan.seats))
        words = np.zeros((len(rows), NUM_PARAM_WORDS), np.int32)
        for i, seat in enumerate(plan.seats):
            words[i] = param_words(seat.params)
            self.kinds[seat.row] = kind_of(seat.params)
        return rows, words.reshape(-1)

    def _block_words(self, plan: StepPlan) -> tuple[Ints, Ints]:
        """Flat places in the block tables and what goes there, int32 [n] each: new seats' tables, then the rest."""
        triples = np.frombuffer(plan.blocks, np.int32).reshape(-1, 3)
        places = [np.arange(len(s.blocks), dtype=np.int32) + s.row * self.max_blocks for s in plan.seats]
        blocks = [np.frombuffer(s.blocks, np.int32) for s in plan.seats]
        places.append(triples[:, 0] * self.max_blocks + triples[:, 1])
        blocks.append(triples[:, 2])
        return np.concatenate(places), np.concatenate(blocks)

    def scatter(self, places: Tensor, blocks: Tensor, rows: Tensor, words: Tensor) -> None:
        """Apply block-table entries and parameters, already on the device."""
        if places.numel():
            self.block_tables_SM.view(-1)[places] = blocks
        if rows.numel():
            self.params_4S[:, rows] = words[:, :4].T
            low, high = words[:, 4:].long().unbind(1)
            self.seeds_S[rows] = high << 32 | low & 0xFFFFFFFF


def param_words(params: RowParams) -> Ints:
    """A row's parameters as six 32-bit words; floats and the seed keep their bits."""
    floats = np.array([params.temperature, params.top_p, params.min_p], np.float32).view(np.int32)
    seed = np.array([params.seed], np.int64).view(np.int32)
    return np.array([floats[0], params.top_k, floats[1], floats[2], seed[0], seed[1]], np.int32)


def kind_of(params: RowParams) -> int:
    """How a row is sampled: 0 for the likeliest token, RANDOM, or FILTERED if top_k, top_p or min_p can drop one."""
    if params.temperature <= 0:
        return 0
    return FILTERED if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0 else RANDOM
